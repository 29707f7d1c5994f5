"""Plan to rewritten model.

Takes traced modules and the Plan for each mode; changes their graphs so that every site that the
plan rewrites calls its `fxprop.ops` function. What the plan leaves is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxprop.errors import RewriteError
from fxprop.graph.sparse_code import SparseCode, parameter_of
from fxprop.graph.verify import rewritten_nodes, verify_graph
from fxprop.ops.catalogue import OPERATORS, Operator, arguments
from fxprop.ops.reads import Product
from fxprop.ops.regions.table import RegionKind
from fxprop.plan.decisions import Decision, Plan, Sparsity
from fxprop.plan.sites import Call, Operand
from fxprop.tracing.module.stored import Graphs
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.module_kinds import is_readable

# the key in node.meta under which a rewritten node has its Decision
META_KEY = "fxprop"
# in that of the nodes that were made for it, the layer's name
_MADE_FOR = "fxprop_made_for"


def rewrite_model(root: nn.Module, pieces: Mapping[str, TracedModule], plans: Mapping[bool, Plan]) -> None:
    """Bring the traced modules in `root`, and its code without a graph, into the form the plans say.

    `pieces` are the traced modules by name; the plan of one mode serves a graph that both modes share.
    The graphs are made from those before the first rewrite, so that this can be done again with other
    plans. Nothing changes unless all of them can be made.
    """
    made = {path: _rewritten_graphs(piece, path, plans) for path, piece in pieces.items()}
    for path, (key, graphs) in made.items():
        pieces[path].fx_show_version(key, graphs)
    for path, products in (_products(plans) | _layers(pieces, plans)).items():
        module = root.get_submodule(path)
        if isinstance(module, SparseCode):
            module.fx_uninstall()
        if products:
            SparseCode.fx_install(module, products)
    for piece in pieces.values():
        piece.fx_arm()


def _rewritten_graphs(
    piece: TracedModule, path: str, plans: Mapping[bool, Plan]
) -> tuple[Hashable, Graphs]:
    """The graphs of `piece` by the plans, and what tells this version of it from others."""
    of_mode = {
        mode: _of_graph(plans[mode if mode in plans else not mode], path) for mode in piece.fx_graphs_before
    }
    key = tuple((mode, d.site.node, d.sparsity) for mode, of in of_mode.items() for d in of)
    if not key:
        return key, piece.fx_graphs_before
    known = piece.fx_version(key)
    if known is not None:
        return key, known
    graphs: dict[bool, fx.Graph] = {}
    for mode, before in sorted(piece.fx_graphs_before.items(), key=lambda item: item[0] != piece.training):
        if graphs.get(not mode) is not None and before is piece.fx_graphs_before[not mode]:
            graphs[mode] = graphs[not mode]
            continue
        graphs[mode] = rewrite(before, of_mode[mode])
        verify_graph(before, graphs[mode], of_mode[mode])
    return key, graphs


def _products(plans: Mapping[bool, Plan]) -> dict[str, dict[str, dict[int, Sparsity]]]:
    """Module without a graph -> parameter -> n -> what is kept; no parameters where all stays dense."""
    by_module: dict[str, dict[str, dict[int, Sparsity]]] = {}
    for decision in (decision for plan in plans.values() for decision in plan.decisions):
        site, sparsity = decision.site, decision.sparsity
        if site.is_node or site.skip is not None:
            continue
        products = by_module.setdefault(site.graph, {})
        if sparsity is not None:
            products.setdefault(parameter_of(site), {})[sparsity.n] = sparsity
    return by_module


def _layers(
    pieces: Mapping[str, TracedModule], plans: Mapping[bool, Plan]
) -> dict[str, dict[str, dict[int, Sparsity]]]:
    """The layers that graphs call no more: they are sparse wherever else they are called from.

    (By other methods than forward, by adapters put around them, by code that runs as written.)
    """
    by_layer: dict[str, dict[str, dict[int, Sparsity]]] = {}
    for plan in plans.values():
        for decision in plan.decisions:
            site = decision.site
            piece = pieces.get(site.graph)
            attribute = site.call.weight.attribute if site.call is not None else None
            if piece is None or attribute is None or not site.is_node:
                continue
            target, _, weight = attribute.rpartition(".")
            layer = piece.get_submodule(target)
            if target and weight == "weight" and not isinstance(layer, TracedModule):
                products = by_layer.setdefault(".".join(filter(None, (site.graph, target))), {})
                if decision.sparsity is not None:
                    products.setdefault(weight, {})[decision.sparsity.n] = decision.sparsity
    for path, piece in pieces.items():
        for graph in piece.fx_graphs.values():
            for node in graph.nodes:
                if node.op == "call_module":
                    by_layer[".".join(filter(None, (path, str(node.target))))] = {}
    return {path: by_layer[path] for path in by_layer if _is_layer(pieces, path)}


def _is_layer(pieces: Mapping[str, TracedModule], path: str) -> bool:
    inner_first = sorted(pieces, key=len, reverse=True)
    owner = next(p for p in inner_first if not p or f"{path}.".startswith(f"{p}."))
    layer = pieces[owner].get_submodule(path.removeprefix(owner).removeprefix("."))
    return is_readable(layer) or isinstance(layer, SparseCode)


def _of_graph(plan: Plan, path: str) -> tuple[Decision, ...]:
    """The rewritten sites in the graph at `path`: one decision for each node."""
    of_nodes = {d.site.node: d for d in plan.rewritten if d.site.graph == path and d.site.is_node}
    return tuple(of_nodes.values())


def rewrite(graph: fx.Graph, decisions: tuple[Decision, ...]) -> fx.Graph:
    """A copy of `graph` with the sites of `decisions` in their sparse form.

    Given (x [8, 64, 56, 56], layer1.0.conv1.weight [64, 64, 3, 3])::

        conv1 = self.layer1[0].conv1(x)                                  # [8, 64, 56, 56]

    Result, with node name, stack trace, module stack and shapes kept::

        layer1_0_conv1_weight = self.layer1[0].conv1.weight
        conv1 = fxprop_ops_conv2d(x, layer1_0_conv1_weight, None, stride=(1, 1), ..., k=3, ...)

    A region becomes one call in the place of its layer, under the name of its last node::

        relu = fxprop_ops_conv_batch_norm(x, layer1_0_conv1_weight, None, layer1_0_bn1, ..., k=3, ...)
    """
    twin = copy.deepcopy(graph)
    nodes = {node.name: node for node in twin.nodes}
    for decision in decisions:
        try:
            node = nodes[decision.site.node]
        except KeyError as error:
            raise RewriteError(
                f"layer {decision.site.name!r}: the graph has no node {decision.site.node!r}; "
                "the plan was made for another graph"
            ) from error
        _rewrite_node(twin, nodes, node, decision)
    return twin


def _rewrite_node(graph: fx.Graph, nodes: dict[str, fx.Node], node: fx.Node, decision: Decision) -> None:
    site, sparsity = decision.site, decision.sparsity
    assert site.call is not None
    assert sparsity is not None
    call: Call = site.call
    with graph.inserting_before(node):
        weight = _fetch(nodes, call.weight, site.name, node)
        bias = None if call.bias is None else _fetch(nodes, call.bias, site.name, node)
        input_ = _fetch(nodes, call.input, site.name, node)
        if call.pad is not None:
            pad, mode = call.pad
            input_ = _derive(site.name, node, graph.call_function(F.pad, (input_, pad), {"mode": mode}))
        constants: dict[str, Any] = {
            name: _fetch(nodes, value, site.name, node) if isinstance(value, Operand) else value
            for name, value in call.constants.items()
        }
    args, kwargs = arguments(Product(site.op, input_, weight, bias, constants))
    called: Operator | RegionKind = OPERATORS[site.op]
    last, inner = node, []
    region = decision.region
    if region is not None:
        called = region.kind
        if region.activation is not None:
            kwargs["activation"] = region.activation
        if region.norm is not None:
            with graph.inserting_before(node):
                norm = _fetch(nodes, Operand(attribute=region.norm), site.name, node)
            args = (*args, norm)
        *inner, last = (nodes[name] for name in (node.name, *region.nodes))
        # where the convolution stood: what lies between may change its input in place
        node.append(last)
    # changed in place: the name, the users and the metadata stay
    last.op = "call_function"
    last.target = called.sparse
    last.args = args
    last.kwargs = {**kwargs, **sparsity.keep.arguments(called.without)}
    last.meta[META_KEY] = decision
    for replaced in reversed(inner):
        graph.erase_node(replaced)


def _fetch(nodes: dict[str, fx.Node], operand: Operand, layer: str, user: fx.Node) -> fx.Node:
    if operand.node is not None:
        return nodes[operand.node]
    assert operand.attribute is not None
    return _derive(layer, user, user.graph.get_attr(operand.attribute))


def made_for(graph: fx.Graph) -> dict[str, str]:
    """The nodes that the rewrite made or changed, and the layers that it did so for, by name."""
    marked = {node.name: node.meta[_MADE_FOR] for node in graph.nodes if _MADE_FOR in node.meta}
    return marked | {n.name: n.meta[META_KEY].site.name for n in graph.nodes if META_KEY in n.meta}


def _derive(layer: str, user: fx.Node, node: fx.Node) -> fx.Node:
    """`node`, made for the layer at `user`, with the metadata that says where it comes from."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in user.meta:
            node.meta[key] = user.meta[key]
    node.meta[_MADE_FOR] = layer
    return node


def is_rewritten(module: object) -> bool:
    """Whether something of `module` itself is in sparse form."""
    if isinstance(module, SparseCode):
        return True
    if isinstance(module, TracedModule):
        return any(rewritten_nodes(graph) for graph in module.fx_graphs.values())
    return isinstance(module, fx.GraphModule) and bool(rewritten_nodes(module.graph))
