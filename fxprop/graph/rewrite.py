"""Plan to rewritten graph.

Takes a graph and the Plan for it; returns a new graph in which every site that the plan rewrites calls
its `fxprop.ops` function. The graph given is not touched, and neither is any node that the plan leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx

from fxprop import ops
from fxprop.errors import RewriteError
from fxprop.ops.common import Keep
from fxprop.plan import Call, Decision, Operand, Plan

# the one key that fxprop writes to node.meta: the node's Decision
META_KEY = "fxprop"

OPERATORS: dict[str, Callable[..., Any]] = {
    "conv1d": ops.conv1d,
    "conv2d": ops.conv2d,
    "conv3d": ops.conv3d,
    "linear": ops.linear,
}


def rewrite(graph: fx.Graph, plan: Plan) -> fx.Graph:
    """A copy of `graph` with the rewritten sites of `plan` in their sparse form.

    Given (x [8, 64, 56, 56], layer1.0.conv1.weight [64, 64, 3, 3])::

        conv1 = self.layer1[0].conv1(x)                                  # [8, 64, 56, 56]

    Result, with node name, stack trace, module stack and shapes kept::

        layer1_0_conv1_weight = self.layer1[0].conv1.weight
        conv1 = fxprop_ops_conv2d(x, layer1_0_conv1_weight, None, stride=(1, 1), ..., k=3, ...)
    """
    twin = copy.deepcopy(graph)
    nodes = {node.name: node for node in twin.nodes}
    for decision in plan.rewritten:
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
    # changed in place: the name, the users and the metadata stay
    node.op = "call_function"
    node.target = OPERATORS[site.op]
    node.args = (input_, weight, bias)
    keep = Keep(sparsity.k, sparsity.select, sparsity.score, sparsity.bias)
    node.kwargs = {**call.geometry, **keep.arguments()}
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


def rewritten_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of `graph` that call a sparse operator."""
    functions = set(OPERATORS.values())
    return [n for n in graph.nodes if n.op == "call_function" and n.target in functions]
