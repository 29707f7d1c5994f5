"""Graph to sites: every use of a conv or linear weight, and everything that looks like one.

Takes a TracedModule, one of its graphs and (if there are example inputs) the Run on it; returns `Site`
records in graph order. Never changes the graph. A node that cannot be rewritten becomes a site with a
reason, not a gap.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxprop.frontends.module import TracedModule
from fxprop.frontends.shapes import Run
from fxprop.graph.functions import read_call
from fxprop.graph.modules import read_module_call
from fxprop.graph.site import Context, call_name
from fxprop.plan import Site


def find_sites(traced: TracedModule, graph: fx.Graph, run: Run | None) -> tuple[Site, ...]:
    """All sites of `graph`, named, in graph order.

    >>> [site.name for site in find_sites(traced, traced.graph, run)][:2]
    ['conv1', 'layer1.0.conv1']
    """
    context = Context(traced, run)
    found = [site for node in graph.nodes if (site := _read(context, node)) is not None]
    return _with_positions(graph, _with_unique_names(found))


def _read(context: Context, node: fx.Node) -> Site | None:
    if node.op == "call_module":
        return read_module_call(context, node)
    if node.op in ("call_function", "call_method"):
        return read_call(context, node)
    return None


def _with_unique_names(sites: list[Site]) -> list[Site]:
    """The second use of a name becomes `name#2`."""
    uses: dict[str, int] = {}
    named = []
    for site in sites:
        uses[site.name] = uses.get(site.name, 0) + 1
        count = uses[site.name]
        named.append(site if count == 1 else replace(site, name=f"{site.name}#{count}"))
    return named


def _with_positions(graph: fx.Graph, sites: list[Site]) -> tuple[Site, ...]:
    """Mark the sites with no other site upstream (first) or downstream (output)."""
    nodes = {node.name: node for node in graph.nodes}
    at_site = {nodes[site.node] for site in sites}
    above: set[fx.Node] = set()  # nodes with a site upstream of them
    for node in graph.nodes:
        if any(i in above or i in at_site for i in _data_inputs(node)):
            above.add(node)
    below: set[fx.Node] = set()  # nodes with a site downstream of them
    for node in reversed(graph.nodes):
        if node in below or node in at_site:
            below.update(_data_inputs(node))
    return tuple(
        replace(
            site,
            is_first=nodes[site.node] not in above,
            is_output=nodes[site.node] not in below,
        )
        for site in sites
    )


# calls whose result carries no gradient of their input: sizes and the like
_SHAPE_ONLY = frozenset(("size", "dim", "numel", "shape", "dtype", "device", "detach", "argmax", "argmin"))


def _data_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose gradient `node` passes on."""
    name = call_name(node.target) if node.op in ("call_method", "call_function") else ""
    if name in _SHAPE_ONLY or (name == "getattr" and node.args[1] in _SHAPE_ONLY):
        return []
    return node.all_input_nodes
