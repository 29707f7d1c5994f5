"""The two parts of a cut backward at work: all examples in front of the cut, the kept ones behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprop.compact.choice import Choice, Kept
from fxprop.compact.cut import CannotCut, Cut
from fxprop.compact.rows import without_gaps
from fxprop.errors import ExamplesError


def make_backward(
    cut: Cut,
    choice: Choice,
    loss: Callable[[list[Any]], Any] | None,
    compact: Callable[[list[Any]], Any],
    fixed_strides: bool = False,
) -> Callable[[list[Any]], Any]:
    """The backward in two parts: `loss` in front of the cut, `compact` for the examples that are kept."""

    def run(args: list[Any]) -> Any:
        choice.served += 1
        in_front = () if loss is None else loss([args[i] for i in cut.loss_inputs])
        fed = [in_front[i.index] if i.from_loss else args[i.index] for i in cut.inputs]
        args.clear()
        gradients = [(cut.inputs[i].rows, fed[i]) for i in cut.gradients]
        n = count_examples(cut, fed)
        k = choice.count(n)
        if k < n or choice.share == "auto":
            norms = torch.stack([rows.norms(g, n) for rows, g in gradients if rows is not None]).sum(0)
            if choice.share == "auto":
                choice.note(norms)
        choice.last = Kept(k, n)
        if fixed_strides:
            for j, i in enumerate(cut.inputs):
                if i.from_loss and isinstance(fed[j], Tensor):
                    fed[j] = fed[j].contiguous()
                elif i.rows is not None and k == n:
                    fed[j] = without_gaps(fed[j])
        if k == n:
            return compact(fed)
        examples, weights = choice.choose(norms, k)
        sizes = {
            i.formula: fed[j]
            for j, i in enumerate(cut.inputs)
            if i.formula is not None and i.formula.is_Symbol
        }
        for j, i in enumerate(cut.inputs):
            if i.rows is not None:
                fed[j] = i.rows.take(fed[j], examples, n)
                if j in cut.gradients and weights is not None:
                    fed[j] = i.rows.weigh(fed[j], weights)
            elif i.formula is not None and cut.symbol in i.formula.free_symbols:
                fed[j] = int(i.formula.subs({**sizes, cut.symbol: k}))
        results = compact(fed)
        return [
            result if rows is None or result is None else rows.put_back(result, examples, n)
            for result, rows in zip(results, cut.results, strict=True)
        ]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


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
            node = result.grad_fn if isinstance(result, Tensor) else None
            if node is not None and "Compiled" in node.name():
                node.register_prehook(functools.partial(_remember, choice, node))
                node.register_hook(functools.partial(_check, choice, node))
                break
        return results

    return run


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

    def run(args: list[Any]) -> Any:
        given = tuple(args)
        args.clear()
        return gm(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def with_reshapes(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with reshape in place of view: strides of kept examples may be others than were foretold."""
    for node in gm.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    gm.recompile()
    return gm
