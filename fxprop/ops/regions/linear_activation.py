"""Linear layer and activation as one operator whose backward computes the kept features alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from fxprop.errors import OpError
from fxprop.ops.activations import ACTIVATIONS, BACKWARDS, Activation
from fxprop.ops.calling import autocast, check_keep, is_dense, sparse
from fxprop.ops.form import Form
from fxprop.ops.keep import Keep
from fxprop.ops.kernels import one_pass
from fxprop.ops.kernels.layout import take_features
from fxprop.ops.linear import Linear, linear
from fxprop.ops.regions.epilogue import Arrived, Behind, Epilogue, Some, run_region, runs_apart
from fxprop.ops.scores import RANDOM, part_of, sum_over_processes, wide
from fxprop.settings import KeepArgs

# keywords of other operators
WITHOUT = ("norm_grad", "chained")

# entries at a time. Not by inductor, whose erf and exp in sums over rows took 3 to 4 times as long
_PIECE = 2**20


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
    keep = Keep.given("linear_activation", settings, WITHOUT)
    if activation not in ACTIVATIONS:
        raise OpError(
            f"linear_activation: activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}"
        )
    n = weight.shape[0]
    if runs_apart(input, keep) or is_dense(keep.larger, n, n, input, weight, bias):
        return ACTIVATIONS[activation](linear(input, weight, bias, **keep.arguments(WITHOUT)))
    check_keep("linear_activation", keep, weight)
    tensors = autocast(input, weight, bias, keep.weight_grad)
    return run_region(Linear(), _Activation(activation), keep, *tensors)


@dataclass(frozen=True)
class _Activation(Epilogue):
    """See `fxprop.ops.regions.epilogue.Epilogue`."""

    name: Activation

    def forward(self, features: Tensor, *own: Tensor | None) -> tuple[Tensor, ...]:
        # ReLU's backward can be told from its output
        return (features.relu_(),) if self.name == "relu" else (ACTIVATIONS[self.name](features), features)

    def saved(self, own: Some, outputs: tuple[Tensor, ...]) -> Some:
        return (outputs[-1],)

    def behind(self, form: Form, keep: Keep, of: Arrived) -> Behind:
        # [rows, out_features]
        (features,) = of.saved
        assert features is not None
        grad, before = (form.arrange(t, of.weight) for t in (of.grad_output, features))

        def sums(grad: Tensor, before: Tensor) -> tuple[Tensor, ...]:
            formula = _sums(self.name, 2 if keep.score == "l2" else 1)
            return one_pass.compute_in_pieces(formula, grad, before, like=grad, entries=_PIECE)

        grad_bias = None
        if of.needs_bias and keep.bias_grad == "full":
            total, scores = sums(grad, before)
            grad_bias = total.to(of.weight.dtype)
            if not any(of.needed):
                return Behind(None, None, grad_bias, ())
        if keep.score == RANDOM:
            scores = torch.rand(of.weight.shape[0], device=grad.device)
        elif grad_bias is None or keep.score_fraction != 1:
            _, scores = sums(part_of(grad, keep.score_fraction), part_of(before, keep.score_fraction))
        if keep.sync_selection:
            scores = sum_over_processes(scores)
        kept = form.top(scores, int(keep.k))
        taken = BACKWARDS[self.name](take_features(grad, kept), take_features(before, kept))  # [rows, k]
        if of.needs_bias and grad_bias is None:
            grad_bias = form.bias(taken, kept, of.weight, of.weight.shape[:1])
        return Behind(kept, taken, grad_bias, ())


@functools.cache
def _sums(activation: str, order: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The formula for sums over the rows of g and of its magnitudes or squares, [features] each."""
    through = BACKWARDS[activation]

    def sums(grad: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        behind = wide(through(grad, before))
        return behind.sum(0), (behind.abs() if order == 1 else behind.square()).sum(0)

    return sums
