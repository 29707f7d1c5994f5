"""Plan to rewritten model.

Takes a Traced model and the Plan for each mode; changes the model's graphs so that every site that the
plan rewrites calls its `fxprop.ops` function. What the plan leaves is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx

from fxprop.errors import RewriteError
from fxprop.frontends.module import TracedModule
from fxprop.frontends.traced import Traced
from fxprop.graph.calls import SparseCode, parameter_of
from fxprop.graph.verify import rewritten_nodes, verify_graph
from fxprop.ops.common import Keep
from fxprop.ops.table import OPERATORS, Product, arguments, takes_bias
from fxprop.plan import Call, Decision, Operand, Plan, Sparsity

# the one key that fxprop writes to node.meta: the node's Decision
META_KEY = "fxprop"

# the attribute that marks a model that `transform` returned
TRANSFORMED = "_fxprop_transformed"


def rewrite_model(traced: Traced, plans: Mapping[bool, Plan]) -> None:
    """Rewrite every graph of `traced`, and the code without a graph, by the plans for its modes."""
    here = traced.training
    for path, piece in traced.pieces.items():
        before = piece.graphs
        graphs: dict[bool, fx.Graph] = {}
        for mode in sorted(before, key=lambda mode: mode != here):
            if mode != here and before[mode] is before.get(here):
                graphs[mode] = graphs[here]
                continue
            decisions = _of_graph(plans[mode], path)
            graphs[mode] = rewrite(before[mode], decisions)
            verify_graph(before[mode], graphs[mode], decisions)
        rewritten = any(rewritten_nodes(graph) for graph in graphs.values())
        if path and not rewritten and not _holds_pieces(path, traced):
            piece.uninstall()  # nothing of it changes: it stays the module that it was
            continue
        piece.replace_graphs(graphs, before)
    for path in traced.products:
        products: dict[str, dict[int, Sparsity]] = {}
        for decision in (d for plan in plans.values() for d in plan.rewritten):
            if not decision.site.is_node and decision.site.graph == path and decision.sparsity:
                of_parameter = products.setdefault(parameter_of(decision.site), {})
                of_parameter[decision.sparsity.n] = decision.sparsity
        if products:
            SparseCode.install(traced.root.get_submodule(path), products)
    vars(traced.root)[TRANSFORMED] = True


def _holds_pieces(path: str, traced: Traced) -> bool:
    return any(other.startswith(f"{path}.") for other in traced.pieces)


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
        weight = _fetch(graph, nodes, call.weight, node)
        bias = None if call.bias is None else _fetch(graph, nodes, call.bias, node)
        input_ = _fetch(graph, nodes, call.input, node)
        if call.pad is not None:
            pad, mode = call.pad
            input_ = _derived(graph, node, graph.call_function(F.pad, (input_, pad), {"mode": mode}))
        constants: dict[str, Any] = {
            name: _fetch(graph, nodes, value, node) if isinstance(value, Operand) else value
            for name, value in call.constants.items()
        }
    args, kwargs = arguments(Product(site.op, input_, weight, bias, constants))
    keep = Keep(sparsity.k, sparsity.select, sparsity.score, sparsity.bias)
    # changed in place: the name, the users and the metadata stay
    node.op = "call_function"
    node.target = OPERATORS[site.op]
    node.args = args
    node.kwargs = {**kwargs, **keep.arguments(takes_bias(site.op))}
    node.meta[META_KEY] = decision


def _fetch(graph: fx.Graph, nodes: dict[str, fx.Node], operand: Operand, user: fx.Node) -> fx.Node:
    if operand.node is not None:
        return nodes[operand.node]
    assert operand.attribute is not None
    return _derived(graph, user, graph.get_attr(operand.attribute))


def _derived(graph: fx.Graph, user: fx.Node, node: fx.Node) -> fx.Node:
    """`node`, made for `user`, with the metadata that says where it comes from."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in user.meta:
            node.meta[key] = user.meta[key]
    return node


def is_rewritten(module: object) -> bool:
    """Whether something of `module` itself is in sparse form."""
    if isinstance(module, SparseCode):
        return True
    if isinstance(module, TracedModule):
        return any(rewritten_nodes(graph) for graph in module.graphs.values())
    return isinstance(module, fx.GraphModule) and bool(rewritten_nodes(module.graph))
