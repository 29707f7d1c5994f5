"""Linear layer and activation as one operator whose backward computes the kept features alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprop.errors import OpError
from fxprop.ops import fused
from fxprop.ops.common import (
    SparseFunction,
    autocast,
    autocast_device,
    check_keep,
    needs_backward,
    refuse_double_backward,
    sparse,
)
from fxprop.ops.linear import dense_forward, from_kept, linear
from fxprop.ops.norm_backward import SCORES
from fxprop.ops.select import (
    RANDOM,
    Keep,
    part_of,
    summed_over_processes,
    take_features,
    top_channels,
    wide,
)
from fxprop.plan import Activation
from fxprop.settings import KeepArgs

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}

# entries at a time. Not by inductor, whose erf and exp in sums over rows took 3 to 4 times as long
_PIECE = 2**20

_aten = torch.ops.aten
# (gradient of the activation's output, its input; ReLU's output does as well) -> gradient of its input
_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, input: _aten.threshold_backward(grad, input, 0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": functools.partial(_aten.gelu_backward, approximate="tanh"),
    "silu": _aten.silu_backward,
}


@sparse
def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`activation(linear(input, weight, bias))`, whose backward computes only the kept features.

    >>> y = fxprop.ops.linear_activation(x, weight, bias, activation="gelu", k=154)

    The same gradients as `gelu(linear(x, weight, bias, k=k))` within rounding. The gradient behind the
    activation is read once for the scores and the bias, and is written for the kept features only.

    Args:
        input, weight, bias: as in `linear`.
        activation: "relu", "gelu", "gelu_tanh" (gelu with approximate="tanh") or "silu".
        k, score, bias_grad, sync_selection, score_fraction, weight_grad: as in `linear`; select is
            "channel".

    Another select, registered scores, devices other than the CPU, where it was not measured, and
    torch.compile, which fuses by itself, call the two one after the other. Raises OpError for arguments
    it cannot take and on double backward. Source: 1706.06197, section 3.3.
    """
    keep = Keep.given("linear_activation", settings, ("norm_grad", "chained"))
    if activation not in ACTIVATIONS:
        raise OpError(
            f"linear_activation: activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}"
        )
    if (
        input.device.type != "cpu"
        or torch.compiler.is_compiling()
        or keep.k >= weight.shape[0]
        or keep.select != "channel"
        or keep.score not in SCORES
        or not needs_backward(input, weight, bias)
    ):
        return ACTIVATIONS[activation](linear(input, weight, bias, **keep.arguments()))
    check_keep("linear_activation", keep, weight)
    input, weight, bias = autocast(input, weight, bias, keep.weight_grad)
    outputs = _SparseLinearActivation.apply(input, weight, bias, activation, keep)
    result: Tensor = outputs[0]
    return result


class _SparseLinearActivation(SparseFunction):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, keep: Keep
    ) -> tuple[Tensor, Tensor | None]:
        features = dense_forward(input, weight, bias)
        if activation == "relu":
            return features.relu_(), None
        return ACTIVATIONS[activation](features), features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        input, weight, _, ctx.activation, ctx.keep = inputs
        result, features = output
        if features is not None:
            ctx.mark_non_differentiable(features)
        # or autograd would fill a tensor with zeros for the features
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, result if features is None else features)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        input, weight, features = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            grads = _backward(
                grad_output, features, input, weight, ctx.activation, ctx.keep, ctx.needs_input_grad
            )
        return (*refuse_double_backward(grads, (grad_output, input, weight)), None, None)


def _backward(
    grad_output: Tensor,
    features: Tensor,
    input: Tensor,
    weight: Tensor,
    activation: str,
    keep: Keep,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_input, needs_weight, needs_bias = needs[:3]
    grad, before = (t.reshape(-1, weight.shape[0]) for t in (grad_output, features))  # [rows, out_features]

    def sums(grad: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        formula = _sums(activation, 2 if keep.score == "l2" else 1)
        return fused.in_pieces(formula, grad, before, like=grad, entries=_PIECE)

    grad_bias = None
    if needs_bias and keep.bias_grad == "full":
        total, scores = sums(grad, before)
        grad_bias = total.to(weight.dtype)
        if not (needs_input or needs_weight):
            return None, None, grad_bias
    if keep.score == RANDOM:
        scores = torch.rand(weight.shape[0], device=grad.device)
    elif grad_bias is None or keep.score_fraction != 1:
        _, scores = sums(part_of(grad, keep.score_fraction), part_of(before, keep.score_fraction))
    kept = top_channels(summed_over_processes(scores) if keep.sync_selection else scores, 1, keep.k)
    taken = _BACKWARDS[activation](take_features(grad, kept), take_features(before, kept))  # [rows, k]
    grad_input, grad_weight = from_kept(taken, kept, input, weight, keep, (needs_input, needs_weight))
    if needs_bias and grad_bias is None:
        grad_bias = taken.new_zeros(weight.shape[0]).index_copy_(0, kept, taken.sum(0))
    return grad_input, grad_weight, grad_bias


@functools.cache
def _sums(activation: str, order: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The formula for sums over the rows of g and of its magnitudes or squares, [features] each."""
    through = _BACKWARDS[activation]

    def sums(grad: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        behind = wide(through(grad, before))
        return behind.sum(0), (behind.abs() if order == 1 else behind.square()).sum(0)

    return sums
