"""The backward from kept entries alone, for the operators' forms: whether, and how."""

from __future__ import annotations

from torch import Tensor

from fxprop.ops.compiling import is_compiling
from fxprop.ops.entries import available
from fxprop.ops.entries.operator import entry_gradients
from fxprop.ops.form import Form, Operands, Pair
from fxprop.ops.keep import Keep
from fxprop.ops.kernels.layout import lies_channels_last
from fxprop.ops.scores import entry_scores, is_magnitude

# entries that are looked at to tell how many are zero
_SAMPLE = 4096


def alone_gradients(
    form: Form, keep: Keep, grad: Tensor, of: Operands, needs_kept: bool
) -> tuple[Pair, Tensor] | None:
    """The gradients from the largest entries alone, and the kept part of `grad`; None if masking is faster.

    Compiled code for any number of examples is as if there were many.
    """
    as_call = form.as_call(grad, of) if available.takes(grad, of.input, of.weight) else None
    if as_call is None:
        return None
    call, tensors = as_call
    example, number = call.example(tensors), tensors.grad.shape[0]
    # of a free size, which is no int, nothing is asked: it would be fixed
    examples = number if isinstance(number, int) else None
    if not (available.are_forced() or example.wins(keep.k, sum(of.needed), examples)):
        return None
    k = min(int(keep.k), example.entries)
    scores = None if is_magnitude(keep) else entry_scores(form.examples(grad), keep)
    grad_input, grad_weight, kept = entry_gradients(*tensors, scores, k, *call, [*of.needed, needs_kept])
    return _pair(form, grad_input, grad_weight, of), kept.view(grad.shape) if needs_kept else kept


def nonzero_gradients(form: Form, grad: Tensor, of: Operands) -> Pair | None:
    """The gradients from the entries that are not zero; None if they are too many, or not to count."""
    if is_compiling() or not available.takes(grad, of.input, of.weight):
        return None
    as_call = form.as_call(grad, of)
    if as_call is None:
        return None
    call, tensors = as_call
    example = call.example(tensors)
    left = _share_left(tensors.grad) * example.entries
    if not (available.are_forced() or example.pays(left, sum(of.needed), len(tensors.grad))):
        return None
    grad_input, grad_weight, _ = entry_gradients(*tensors, None, 0, *call, [*of.needed, False])
    return _pair(form, grad_input, grad_weight, of)


def _share_left(grad: Tensor) -> float:
    """About what share of the entries is not zero: by a few thousand of them, evenly spaced."""
    if not (grad.is_contiguous() or lies_channels_last(grad)):
        grad = grad.contiguous()
    # odd, as pooling leaves every other entry
    step = grad.numel() // _SAMPLE | 1
    sample = grad.as_strided((-(-grad.numel() // step),), (step,))
    return float(sample.count_nonzero()) / len(sample)


def _pair(form: Form, grad_input: Tensor, grad_weight: Tensor, of: Operands) -> Pair:
    pair = (grad_input if of.needed[0] else None, grad_weight if of.needed[1] else None)
    return form.of_call(pair, of)
