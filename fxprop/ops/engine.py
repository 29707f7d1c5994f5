"""The one backward: select, then compute with what is left, for every operator and selection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxprop.ops.compiling import is_compiling
from fxprop.ops.form import Form, Gradients, Operands
from fxprop.ops.function import SparseFunction, autocast_device, refuse_double_backward
from fxprop.ops.keep import Keep
from fxprop.ops.selections import SELECTIONS, Given


def run(
    form: Form, keep: Keep, input: Tensor, weight: Tensor, bias: Tensor | None = None, *others: Tensor
) -> Tensor:
    """The dense operator's output, whose backward keeps what `keep` says."""
    if keep.of_input == 0:
        input = input.detach()  # so that nothing upstream is computed for it
    needed = (input.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    if not any(keep.needs(needed)):
        with torch.no_grad():
            return form.forward(input, weight, bias, *others)
    output: Tensor = _Sparse.apply(form, keep, input, weight, bias, *others)
    return output


# (weight, grad_output as it arrives, what is kept of it)
Observer = Callable[[Tensor, Tensor, Tensor], None]
# asked in every sparse backward of single operators, which autograd may run in threads of its own
_observers: list[Observer] = []


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Shows `observer` what each sparse backward keeps; not of regions, nor of compiled code.

    Of layers with a share for each gradient it is shown the larger. It is selected once more for it: with
    score="random" it is another draw.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


class _Sparse(SparseFunction):
    """An operator with a sparse backward."""

    @staticmethod
    def forward(
        form: Form, keep: Keep, input: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor
    ) -> Tensor:
        return form.forward(input, weight, bias, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form, ctx.keep, input, weight, bias, *others = inputs
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(input, weight, *others)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # read once: checkpointing hands out each tensor but once
        input, weight, *others = ctx.saved_tensors
        *needed, needs_bias = ctx.keep.needs(ctx.needs_input_grad[2:5])
        of = Operands(input, weight, tuple(others), tuple(needed))
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            grads = _backward(ctx, grad_output, of, needs_bias)
        marked = refuse_double_backward(grads, (grad_output, input, weight))
        return None, None, *marked, *(None for _ in others)


def _backward(ctx: Any, grad_output: Tensor, of: Operands, needs_bias: bool) -> Gradients:
    form, keep = ctx.form, ctx.keep
    grad = form.arrange(grad_output, of.weight)
    full_bias = None
    if needs_bias and keep.bias_grad == "full":
        full_bias = form.bias(grad, None, of.weight, ctx.bias_shape)
        needs_bias = False
    if not (any(of.needed) or needs_bias):
        return None, None, full_bias
    selection = SELECTIONS[keep.select]
    if _observers and not is_compiling():
        given = Given(grad, of, selection.rank(form, keep, grad, of))
        kept = selection.kept(form, keep.larger, given)
        for observer in _observers:
            observer(of.weight, grad, kept)
    bias = ctx.bias_shape if needs_bias else None
    if keep.is_one:
        given = Given(grad, of, selection.rank(form, keep, grad, of))
        gradients = selection.backward(form, keep, given, bias)
    else:
        gradients = _of_shares(form, keep, grad, of, bias)
    return gradients[0], gradients[1], full_bias if full_bias is not None else gradients[2]


def _of_shares(form: Form, keep: Keep, grad: Tensor, of: Operands, bias: torch.Size | None) -> Gradients:
    """Each gradient from what is kept for it; the bias's goes with the weight's."""
    selection = SELECTIONS[keep.select]
    n, example = form.choices(grad), form.examples(grad).shape[1]
    for_input, for_weight = (selection.keeps_all(k, n, example) for k in (keep.of_input, keep.of_weight))
    asks_weight = of.needed[1] or bias is not None
    ranked = None
    if (of.needed[0] and not for_input) or (asks_weight and not for_weight):
        ranked = selection.rank(form, keep, grad, of)

    def part(k: int | float, is_all: bool, given: Given, bias: torch.Size | None) -> Gradients:
        if not is_all:
            return selection.backward(form, keep.only(k), given, bias)
        pair = form.products(grad, form.arrange_input(of.input), of.weight, given.of)
        grad_bias = None if bias is None else form.bias(grad, None, of.weight, bias)
        return *form.restore(pair, given.of), grad_bias

    grad_input = grad_weight = grad_bias = None
    if of.needed[0]:
        scores = ranked
        if keep.score_weight and ranked is not None:
            scores = form.weighted(ranked, keep, of)
        given = Given(grad, of._replace(needed=(True, False)), scores)
        grad_input, _, _ = part(keep.of_input, for_input, given, None)
    if asks_weight:
        given = Given(grad, of._replace(needed=(False, of.needed[1])), ranked)
        _, grad_weight, grad_bias = part(keep.of_weight, for_weight, given, bias)
    return grad_input, grad_weight, grad_bias
