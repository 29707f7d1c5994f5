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
from fxprop.ops.selections import SELECTIONS


def run(
    form: Form, keep: Keep, input: Tensor, weight: Tensor, bias: Tensor | None = None, *others: Tensor
) -> Tensor:
    """The dense operator's output, whose backward keeps what `keep` says."""
    output: Tensor = _Sparse.apply(form, keep, input, weight, bias, *others)
    return output


# (weight, grad_output as it arrives, what is kept of it)
Observer = Callable[[Tensor, Tensor, Tensor], None]
# asked in every sparse backward of single operators, which autograd may run in threads of its own
_observers: list[Observer] = []


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Shows `observer` what each sparse backward keeps; not of regions, nor of compiled code.

    What is kept is selected once more for it: with score="random" it is another draw.
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
        needs_input, needs_weight = ctx.needs_input_grad[2:4]
        of = Operands(input, weight, tuple(others), (needs_input, needs_weight))
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            grads = _backward(ctx, grad_output, of)
        marked = refuse_double_backward(grads, (grad_output, input, weight))
        return None, None, *marked, *(None for _ in others)


def _backward(ctx: Any, grad_output: Tensor, of: Operands) -> Gradients:
    form, keep, needs_bias = ctx.form, ctx.keep, ctx.needs_input_grad[4]
    grad = form.arrange(grad_output, of.weight)
    full_bias = None
    if needs_bias and keep.bias_grad == "full":
        full_bias = form.bias(grad, None, of.weight, ctx.bias_shape)
        needs_bias = False
    if not (any(of.needed) or needs_bias):
        return None, None, full_bias
    if _observers and not is_compiling():
        kept = SELECTIONS[keep.select].kept(form, keep, grad, of)
        for observer in _observers:
            observer(of.weight, grad, kept)
    gradients = SELECTIONS[keep.select].backward(
        form, keep, grad, of, ctx.bias_shape if needs_bias else None
    )
    return gradients[0], gradients[1], full_bias if full_bias is not None else gradients[2]
