"""The two parts of a cut backward at work: all examples in front of the cut, the kept ones behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprop.compact.choice import Choice, Chosen
from fxprop.compact.cut import CannotCut, Cut
from fxprop.compact.rows import without_gaps
from fxprop.errors import ExamplesError


class CutBackward:
    """A backward in two parts: `loss` in front of the cut, `compact` for the examples that are kept.

    Called with a list of what the whole backward takes, which it empties. `fixed_strides`: compiled code
    relies on the strides that it was compiled for.
    """

    def __init__(
        self,
        cut: Cut,
        choice: Choice,
        loss: Callable[[list[Any]], Any] | None,
        compact: Callable[[list[Any]], Any],
        *,
        fixed_strides: bool = False,
    ) -> None:
        self._cut, self._choice, self._loss, self._compact = cut, choice, loss, compact
        self._fixed_strides = fixed_strides
        self._boxed_call = True  # AOTAutograd's word for a function of one list

    def __call__(self, args: list[Any]) -> Any:
        cut, choice = self._cut, self._choice
        choice.served += 1
        in_front = () if self._loss is None else self._loss([args[i] for i in cut.loss_inputs])
        fed = [in_front[i.index] if i.from_loss else args[i.index] for i in cut.inputs]
        args.clear()
        n = count_examples(cut, fed)
        k, is_first = choice.decide(n)
        learns = is_first and choice.share == "auto"
        norms = self._norms(fed, n) if k < n or learns else None
        if norms is not None and learns:
            choice.note(norms)
        if self._fixed_strides:
            self._fix_strides(fed, k == n)
        if norms is None or k == n:
            return self._compact(fed)
        chosen = choice.choose(norms, k)
        self._take(fed, chosen, n)
        return [
            result if rows is None or result is None else rows.put_back(result, chosen.examples, n)
            for result, rows in zip(self._compact(fed), cut.results, strict=True)
        ]

    def _fix_strides(self, fed: list[Any], whole: bool) -> None:
        for j, given in enumerate(self._cut.inputs):
            if given.from_loss and isinstance(fed[j], Tensor):
                fed[j] = fed[j].contiguous()
            elif given.rows is not None and whole:  # taking some does the same
                fed[j] = without_gaps(fed[j])

    def _norms(self, fed: Sequence[Any], n: int) -> Tensor:
        """Of each example's gradient at the cut; those of several tensors are added."""
        gradients = [(self._cut.inputs[j].rows, fed[j]) for j in self._cut.gradients]
        return torch.stack([rows.norms(g, n) for rows, g in gradients if rows is not None]).sum(0)

    def _take(self, fed: list[Any], chosen: Chosen, n: int) -> None:
        """The chosen examples, in place of all; gradients at the cut are weighted."""
        cut, k = self._cut, len(chosen.examples)
        formulas = zip((given.formula for given in cut.inputs), fed, strict=True)
        sizes = {formula: value for formula, value in formulas if formula is not None and formula.is_Symbol}
        for j, given in enumerate(cut.inputs):
            if given.rows is not None:
                fed[j] = given.rows.take(fed[j], chosen.examples, n)
                if j in cut.gradients and chosen.weights is not None:
                    fed[j] = given.rows.weigh(fed[j], chosen.weights)
            elif given.formula is not None and cut.symbol in given.formula.free_symbols:
                # the number of all examples is a factor of most
                times = int(fed[j]) * k // n
                fed[j] = times if given.is_multiple else int(given.formula.subs({**sizes, cut.symbol: k}))


def count_examples(cut: Cut, fed: Sequence[Any]) -> int:
    """How many examples there are, by a size that says so."""
    for given, value in zip(cut.inputs, fed, strict=True):
        if given.formula == cut.symbol:
            return int(value)
        if given.rows is not None and given.rows.outer > 0 and given.rows.inner > 0:
            return int(value.shape[given.rows.dim]) // (given.rows.outer * given.rows.inner)
    raise CannotCut("no gradient says how many examples there are")


def noticing_dense(compiled: Callable[..., Any], choice: Choice) -> Callable[..., Any]:
    """`compiled`, whose backward raises if it did not go through the cut."""

    def run(*args: Any) -> Any:
        results = compiled(*args)
        for result in results if isinstance(results, list | tuple) else (results,):
            node = _compiled_node(result.grad_fn) if isinstance(result, Tensor) else None
            if node is not None:
                node.register_prehook(functools.partial(_remember, choice, node))
                node.register_hook(functools.partial(_check, choice, node))
                break
        return results

    return run


def _compiled_node(node: Any) -> Any:
    """AOTAutograd's node of a backward: a result's own, or behind the views that the result was made by."""
    while node is not None and "Compiled" not in node.name():
        node = node.next_functions[0][0] if node.next_functions else None
    return node


def on_all(run: Callable[..., Any], choice: Choice) -> Callable[..., Any]:
    """`run`, for mini-batches of which no part can be chosen."""

    def run_whole(*args: Any) -> Any:
        choice.last = None
        return run(*args)

    return run_whole


def _remember(choice: Choice, node: Any, grads: Any) -> None:
    node.metadata["fxprop_served"] = choice.served


def _check(choice: Choice, node: Any, grad_inputs: Any, grads: Any) -> None:
    if node.metadata.pop("fxprop_served") == choice.served:
        raise ExamplesError(
            f"examples={choice.share!r} was asked for, but the backward ran on all of them: it is not the "
            "one that fxprop cut. Clear torch's caches (torch.compiler.reset()), and please report this"
        )


def run_aten(gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """A graph as a function of one list, which it empties, so that values are freed as they are used."""
    _write_into_zeros(gm)

    def run(args: list[Any]) -> Any:
        given = tuple(args)
        args.clear()
        return gm(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


_MAKES_ZEROS = (
    torch.ops.aten.zeros.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_zeros.default,
)


def _write_into_zeros(gm: fx.GraphModule) -> None:
    """Let what is copied into fresh zeros be written there: a trace made a copy of these first."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.index_copy.default):
        zeros = node.args[0]
        if zeros.target in _MAKES_ZEROS and len(zeros.users) == 1:
            node.target = torch.ops.aten.index_copy_.default
    gm.recompile()


def with_reshapes(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with reshape in place of view: strides of kept examples may be others than were foretold."""
    for node in gm.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    gm.recompile()
    return gm
