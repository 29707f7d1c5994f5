"""What a forward graph says about the values that it saves for its backward."""

from __future__ import annotations

from collections.abc import Container, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxprop.compact.flattened import Unknown, size_of
from fxprop.compact.follow import Examples, tensors_in
from fxprop.compact.rows import Rows

if TYPE_CHECKING:
    import sympy


@dataclass(frozen=True)
class Forward:
    """What the forward graph says about the values that it saves, by name."""

    rows: Mapping[str, Any]
    # those computed from parameters
    parameters: frozenset[str]
    # the places in its outputs, by what AOTAutograd calls them
    outputs: Mapping[Any, Any]
    symbol: sympy.Symbol
    # the first node that makes something without examples of something with them
    ended: fx.Node | None


def read_forward(graph: fx.Graph, symbol: sympy.Symbol, names: Container[str]) -> Forward:
    """Where the examples lie in the values of a forward graph; `names` are the parameters'."""
    examples = Examples(symbol)
    parameters: set[fx.Node] = set()
    ended: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                parameters.add(node)
            examples.put(node, find_alone(examples, node.meta.get("val")))
        elif node.op != "output":
            examples.follow(node)
            if is_of(parameters, node):
                parameters.add(node)
            if ended is None and _ends(examples, node):
                ended = node
    (output,) = (node for node in graph.nodes if node.op == "output")
    return Forward(
        {node.name: examples.found(node) for node in graph.nodes},
        frozenset(node.name for node in parameters),
        # private: the metadata by which AOTAutograd itself matches a gradient with its output.
        # tests/test_examples_refused_or_right.py would notice
        {
            described: examples.found(n)
            for n, described in zip(output.args[0], output.meta["desc"], strict=True)
            if isinstance(n, fx.Node)
        },
        symbol,
        ended,
    )


def _ends(examples: Examples, node: fx.Node) -> bool:
    if not isinstance(node.meta.get("val"), Tensor) or examples.found(node) is not None:
        return False
    return any(isinstance(examples.found(tensor), Rows) for tensor in tensors_in(node.args))


def is_of(nodes: Set[fx.Node], node: fx.Node) -> bool:
    """Whether a node computes something of these alone."""
    inputs = list(tensors_in((*node.args, *node.kwargs.values())))
    return bool(inputs) and all(n in nodes for n in inputs)


def find_alone(examples: Examples, value: Any) -> Rows | Unknown | None:
    """Where they lie in an input, by its sizes alone."""
    dims = examples.dims(value)
    if not dims:
        return None
    if len(dims) > 1:
        return Unknown("it has the examples in several dimensions")
    if size_of(value.shape[dims[0]]) != examples.symbol:
        return Unknown("it has the examples among others, in an order that is not known")
    return Rows(dims[0])
