"""The cut in a backward graph: in front of it all examples, behind it those that are kept.

Where a model returns tensors with examples, the cut is at their gradients. Where it returns a loss, the
cut is at the gradients of what enters the loss: the last ones in front of the first parameter.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprop.compact.apart import is_batch_norm, joins_examples, reduces_by_rank
from fxprop.compact.flattened import Unknown
from fxprop.compact.follow import FACTORIES, Examples, describe, name_of
from fxprop.compact.forward import Forward, find_alone, is_of
from fxprop.compact.rows import Rows
from fxprop.errors import ExamplesError

if TYPE_CHECKING:
    import sympy


class CannotCut(ExamplesError):
    """A backward graph that has no cut behind which the examples are apart; the message says why."""


@dataclass(frozen=True)
class Input:
    """How a value enters the part behind the cut: its examples taken, or as it is."""

    # its index among the placeholders of the whole backward, or what the part in front returns
    index: int
    from_loss: bool
    rows: Rows | None
    # for a number that follows from how many examples there are: the formula
    formula: sympy.Expr | None = None
    # whether that is a multiple of it, whatever else it has
    is_multiple: bool = False


@dataclass(frozen=True)
class Cut:
    """A backward graph in two parts: `loss` for all examples, `compact` for those that are kept."""

    # None where the cut is at the gradients of the outputs themselves
    loss: fx.GraphModule | None
    # the placeholders of the whole that `loss` reads
    loss_inputs: tuple[int, ...]
    compact: fx.GraphModule
    inputs: tuple[Input, ...]
    # those of them that are the gradients at the cut
    gradients: tuple[int, ...]
    # where the examples lie in each result; None where it has none
    results: tuple[Rows | None, ...]
    symbol: sympy.Symbol


def find_cut(gm: fx.GraphModule, forward: Forward) -> Cut:
    """Cut a backward graph. Raises CannotCut, with the line of the model that is in the way."""
    return _Cutter(gm, forward).cut()


# the same entries in another shape
_SAME_ENTRIES = (
    "aten.view",
    "aten._unsafe_view",
    "aten.reshape",
    "aten.t",
    "aten.transpose",
    "aten.permute",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.detach",
    "aten.alias",
    "aten.clone",
)


class _Cutter:
    def __init__(self, gm: fx.GraphModule, forward: Forward) -> None:
        self._gm, self._forward = gm, forward
        self._examples = Examples(forward.symbol)
        self._nodes = list(gm.graph.nodes)
        self._placeholders = [n for n in self._nodes if n.op == "placeholder"]
        self._tangents = [n for n in self._placeholders if n.name.startswith("tangents")]
        (self._output,) = (n for n in self._nodes if n.op == "output")
        for node in self._placeholders:
            self._examples.put(node, self._of_placeholder(node))
        for node in self._nodes:
            if node.op not in ("placeholder", "output"):
                self._examples.follow(node)

    def _of_placeholder(self, node: fx.Node) -> Any:
        if node.name in self._forward.rows:
            return self._forward.rows[node.name]
        # a gradient lies as its output does
        output = getattr(node.meta.get("desc"), "output", None)
        if output in self._forward.outputs:
            return self._forward.outputs[output]
        return find_alone(self._examples, node.meta.get("val"))

    def cut(self) -> Cut:
        """The two parts."""
        if not self._tangents:
            raise CannotCut("the backward graph has no gradient of an output")
        frontier = self._frontier()
        found = [self._examples.found(node) for node in frontier]
        if not any(isinstance(rows, Rows) for rows in found):
            for unknown in found:
                if isinstance(unknown, Unknown) and unknown.node is not None:
                    raise CannotCut(f"{unknown.reason}: {describe(unknown.node)}")
            ended = self._forward.ended
            raise CannotCut(
                "no gradient at the model's outputs or its loss has a dimension for the examples"
                + (f", which end at {describe(ended)}" if ended is not None else "")
            )
        self._check(frontier)
        return self._split(frontier)

    def _frontier(self) -> list[fx.Node]:
        if all(self._examples.dims(tangent.meta.get("val")) for tangent in self._tangents):
            return self._tangents
        ends = self._ends()
        region, parameters = (
            set(self._tangents),
            {n for n in self._placeholders if n.name in self._forward.parameters},
        )
        behind: set[fx.Node] = set()
        frontier: dict[fx.Node, None] = {}
        for node in self._nodes:
            if node.op == "placeholder":
                continue
            inputs = [n for n in node.all_input_nodes if n in region]
            if (
                node.op == "output"
                or node in ends
                or any(n in parameters or n in behind for n in node.all_input_nodes)
            ):
                frontier.update(dict.fromkeys(map(self._base, inputs)))
                if is_of(parameters, node):
                    parameters.add(node)
                else:
                    behind.add(node)
            elif inputs:
                region.add(node)
        return list(frontier)

    def _ends(self) -> set[fx.Node]:
        """The nodes behind which no tensor has examples: they make the gradients of parameters."""
        ends: set[fx.Node] = set()
        for node in reversed(self._nodes):
            found = self._examples.found(node)
            has_rows = any(
                isinstance(f, Rows | Unknown) for f in (found if isinstance(found, list) else [found])
            )
            if node.op == "output" or (not has_rows and all(user in ends for user in node.users)):
                ends.add(node)
        return ends

    def _base(self, node: fx.Node) -> fx.Node:
        """What a gradient is a view of, so that one that is read in several shapes counts once."""
        while name_of(node) in _SAME_ENTRIES:
            (viewed,) = node.all_input_nodes[:1]
            if not isinstance(self._examples.found(viewed), Rows):
                break
            node = viewed
        return node

    def _check(self, frontier: list[fx.Node]) -> None:
        """Raise CannotCut unless the examples are apart in all that is computed behind the cut."""
        marks = {node: "each" for node in frontier if isinstance(self._examples.found(node), Rows)}
        for node in self._behind(frontier):
            if node.op != "call_function":
                continue
            try:
                mark, reason = self._mark(node, marks)
            except Unknown as unknown:
                raise CannotCut(f"{unknown.reason}: {describe(unknown.node or node)}") from None
            if reason is not None:
                raise CannotCut(f"{reason}: {describe(node)}")
            if mark is not None:
                marks[node] = mark
        for node in _nodes_in(self._output.args):
            if marks.get(node) == "rank":
                raise CannotCut(f"it is no sum over the examples: {describe(node)}")

    def _mark(self, node: fx.Node, marks: Mapping[fx.Node, str]) -> tuple[str | None, str | None]:
        """What of the gradients at the cut a node has, and why that joins examples.

        "each": of each example its own; "sum": sums over them; "rank": what choices are made by.
        """
        examples, gets = self._examples, node.target is operator.getitem
        reason = None if gets else joins_examples(node, examples)
        found = examples.found(node)
        if isinstance(found, Unknown):
            raise found
        if reason is not None:
            return None, reason
        inputs = {marks.get(n) for n in node.all_input_nodes}
        with_rows = any(isinstance(f, Rows) for f in (found if isinstance(found, list) else [found]))
        if with_rows:
            if inputs & {"sum", "rank"} and not is_batch_norm(node):
                return None, "it gives a sum over the examples back to each of them"
            return ("each" if "each" in inputs else None), None
        had_rows = any(isinstance(examples.found(n), Rows) for n in node.all_input_nodes)
        if had_rows and "each" not in inputs and not gets and _reads_values(node):
            return None, "it sums over the examples of the forward"
        if _is_integer(node) or not inputs - {None}:
            return None, None  # which channels are kept: a choice
        ranks = "rank" in inputs or ("each" in inputs and reduces_by_rank(node))
        return ("rank" if ranks else "sum"), None

    def _behind(self, frontier: list[fx.Node]) -> list[fx.Node]:
        """What the results need, from the cut on, in order."""
        needed = _needed(_nodes_in(self._output.args), frontier)
        return [node for node in self._nodes if node in needed and node not in frontier]

    def _split(self, frontier: list[fx.Node]) -> Cut:
        behind = self._behind(frontier)
        index = {node: number for number, node in enumerate(self._placeholders)}
        made = [node for node in frontier if node not in index]
        compact = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        inputs: list[Input] = []
        entering = [n for n in behind if n.op == "placeholder"]
        ordered = sorted((*entering, *(n for n in frontier if n in index)), key=index.__getitem__)
        for node in (*ordered, *made):
            copies[node] = compact.placeholder(node.name)
            copies[node].meta = dict(node.meta)
            value = node.meta.get("val")
            formula = value.node.expr if isinstance(value, torch.SymInt) else None
            found = self._examples.found(node)
            if isinstance(found, Unknown):
                raise CannotCut(f"{found.reason}: {describe(found.node or node)}")
            position = made.index(node) if node in made else index[node]
            is_multiple = formula is not None and not (formula / self._forward.symbol).has(
                self._forward.symbol
            )
            inputs.append(Input(position, node in made, found, formula, is_multiple))
        self._check_formulas(inputs)
        for node in behind:
            if node.op != "placeholder":
                copies[node] = compact.node_copy(node, copies.__getitem__)
        results = self._output.args[0]
        compact.output(fx.map_arg(results, copies.__getitem__))
        gradients = [
            n
            for n, node in enumerate((*ordered, *made))
            if node in frontier and isinstance(self._examples.found(node), Rows)
        ]
        loss, loss_inputs = self._loss(made, index)
        return Cut(
            loss,
            loss_inputs,
            fx.GraphModule(self._gm, compact),
            tuple(inputs),
            tuple(gradients),
            tuple(self._of_result(node) for node in results),
            self._forward.symbol,
        )

    def _check_formulas(self, inputs: Sequence[Input]) -> None:
        known = {given.formula for given in inputs} | {self._forward.symbol}
        for given in inputs:
            if given.formula is None or given.is_multiple or not given.formula.has(self._forward.symbol):
                continue
            if given.formula.free_symbols - known:
                raise CannotCut(f"its backward computes with {given.formula}, of which not all is known")

    def _of_result(self, node: Any) -> Rows | None:
        return self._examples.at(node) if isinstance(node, fx.Node) else None

    def _loss(
        self, made: list[fx.Node], index: Mapping[fx.Node, int]
    ) -> tuple[fx.GraphModule | None, tuple[int, ...]]:
        if not made:
            return None, ()
        needed = _needed(made)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in made))
        return fx.GraphModule(self._gm, graph), tuple(index[n] for n in self._placeholders if n in needed)


def _needed(ends: Iterable[fx.Node], known: Container[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that these are computed from, themselves included; none in front of `known`."""
    needed: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend([] if node in known else node.all_input_nodes)
    return needed


def _nodes_in(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nodes_in(item)


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def _reads_values(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and name_of(node) not in FACTORIES
