"""Graphs to sites: every use of a conv, linear or product weight, and everything that looks like one.

Takes a Traced model, a mode and (if there are example inputs) the Run in it; returns `Site` records in the
order in which they run. Never changes a graph. A use that cannot be rewritten becomes a site with a
reason, not a gap.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import fx

from fxprop.graph.context import Context, call_name
from fxprop.graph.find_regions import region_of
from fxprop.graph.read_functions import read_call
from fxprop.graph.read_modules import opaque_module, read_module_call
from fxprop.graph.sparse_code import product_site
from fxprop.plan.sites import Site
from fxprop.tracing.observe.records import GraphCall, Run
from fxprop.tracing.traced import Traced


class _Found(NamedTuple):
    site: Site
    # when it ran, and the autograd function that made its output
    order: int
    function: int | None


def find_sites(traced: Traced, training: bool, run: Run | None) -> tuple[Site, ...]:
    """All sites of the model's graphs in a mode, named, in the order in which they run.

    >>> [site.name for site in find_sites(traced, True, run)][:2]
    ['conv1', 'layer1.0.conv1']
    """
    listed: list[_Found] = []
    for path, piece in traced.pieces.items():
        graph = piece.fx_graphs.get(training)
        if graph is not None:
            calls = [None] if run is None else run.calls.get(path, [])
            for call in calls:
                listed += _of_graph(traced, path, graph, call)
    if run is None:
        return _by_graph(traced, training, _with_unique_names([f.site for f in listed]))
    inner = set(traced.products)
    listed += [
        _Found(product_site(traced.root, call), call.order, call.function)
        for call in run.products
        if call.module in inner
    ]
    for path, order in run.opaque.items():
        site = opaque_module(
            path, traced.root.get_submodule(path), "", path, None, traced.opaque[path] or None
        )
        if site is not None and not any(f.site.name == path for f in listed):
            listed.append(_Found(site, order, None))
    listed.sort(key=lambda f: f.order)
    named = _with_unique_names([f.site for f in listed])
    functions = [f.function for f in listed]
    # a skipped call may hold many functions; what it returns stands for it
    known = [f for f in functions if f is not None]
    first, output = run.autograd.positions(known)
    behind = run.autograd.behind(known)
    names = {None: ""} | {f: site.name for site, f in zip(named, functions, strict=True) if f is not None}
    return tuple(
        replace(
            site,
            is_first=function in first,
            is_output=function in output,
            behind=None if function is None else tuple(sorted(names[f] for f in behind[function])),
        )
        for site, function in zip(named, functions, strict=True)
    )


def _of_graph(traced: Traced, path: str, graph: fx.Graph, call: GraphCall | None) -> list[_Found]:
    context = Context(
        traced.pieces[path],
        graph,
        call,
        path,
        parameters=traced.parameters,
        elsewhere=frozenset([*traced.pieces, *traced.untraced]) - {""},
        reasons=traced.opaque,
    )
    sites = []
    for node in graph.nodes:
        site = None
        if node.op == "call_module":
            site = read_module_call(context, node)
        elif node.op in ("call_function", "call_method"):
            site = read_call(context, node)
        if site is not None:
            site = replace(
                site, region=region_of(context, node, site), is_only_reader=_is_only_reader(site, node)
            )
            order = call.order.get(node.name, 0) if call else 0
            sites.append(_Found(site, order, call.functions.get(node.name) if call else None))
    return sites


def _is_only_reader(site: Site, node: fx.Node) -> bool:
    if site.call is None or site.call.pad is not None:
        return False
    inputs = [n for n in node.all_input_nodes if n.name == site.call.input.node]
    return len(inputs) == 1 and len(inputs[0].users) == 1


def _with_unique_names(sites: list[Site]) -> list[Site]:
    """The second use of a name becomes `name#2`."""
    uses: dict[str, int] = {}
    named = []
    for site in sites:
        uses[site.name] = uses.get(site.name, 0) + 1
        count = uses[site.name]
        named.append(site if count == 1 else replace(site, name=f"{site.name}#{count}"))
    return named


# --- without a run: positions as far as one graph shows them --------------------------------------------


def _by_graph(traced: Traced, training: bool, sites: list[Site]) -> tuple[Site, ...]:
    """Mark the sites of the model's own graph with no other site upstream or downstream in it."""
    root = traced.pieces.get("")
    if root is None or training not in root.fx_graphs:
        return tuple(sites)
    graph = root.fx_graphs[training]
    nodes = {node.name: node for node in graph.nodes}
    at_site = {node for node in graph.nodes if _is_at(traced, node, sites)}
    above: set[fx.Node] = set()  # nodes with a site upstream of them
    for node in graph.nodes:
        if any(i in above or i in at_site for i in _data_inputs(node)):
            above.add(node)
    below: set[fx.Node] = set()  # nodes with a site downstream of them
    for node in reversed(graph.nodes):
        if node in below or node in at_site:
            below.update(_data_inputs(node))

    def mark(site: Site) -> Site:
        if site.graph:
            return site
        node = nodes[site.node]
        return replace(site, is_first=node not in above, is_output=node not in below)

    return tuple(mark(site) for site in sites)


def _is_at(traced: Traced, node: fx.Node, sites: list[Site]) -> bool:
    """Whether `node` is a site, or a call of a module that holds one."""
    inside = f"{node.target}." if node.op == "call_module" else None
    return any(
        site.node == node.name
        if not site.graph
        else inside is not None and f"{site.graph}.".startswith(inside)
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


def with_positions_of(known: tuple[Site, ...], sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """`sites`, of a mode that could not be run, with their namesakes' positions in the other mode."""
    by_name = {site.name: site for site in known}

    def place(site: Site) -> Site:
        twin = by_name.get(site.name)
        return site if twin is None else replace(site, is_first=twin.is_first, is_output=twin.is_output)

    return tuple(place(site) for site in sites)
