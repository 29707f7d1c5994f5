"""The backward of batch-norm and ReLU for the channels that a convolution before them keeps.

In training, batch-norm's backward is independent per channel (Ioffe and Szegedy, 1502.03167, section 3):

    grad_input = scale * (g - sum(g) / m - xhat * sum(g * xhat) / m),    scale = gamma / std

with g the gradient behind ReLU's mask, m the entries per channel and xhat the normalised input. So the
norm of each channel of grad_input follows from sums, before any entry of it exists: with sum(xhat) = 0 and
sum(xhat^2) = m

    sum(grad_input^2) = scale^2 * (sum(g^2) - sum(g)^2 / m - sum(g * xhat)^2 / m)

Only the channels that are kept are then computed. (xhat^2 sums to m * var / (var + eps): the sum over
`xhat` is taken with the same eps, and the difference is accounted for.)

Tensors are [N, C, positions], or [positions, C] where channels are last in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxprop.ops.keep import Keep
from fxprop.ops.kernels import one_pass
from fxprop.ops.kernels.layout import is_channels_last, take_channels
from fxprop.ops.scores import RANDOM, part_of, sum_over_processes, wide


class Sums(NamedTuple):
    """Over all entries of a channel, [C] each: of g, of g * xhat, of g^2."""

    grad: Tensor
    product: Tensor
    square: Tensor


class NormBackward(NamedTuple):
    """What the backward of batch-norm and ReLU needs; `output` is None where there is no ReLU."""

    grad_output: Tensor
    output: Tensor | None
    input: Tensor
    mean: Tensor
    invstd: Tensor
    gamma: Tensor | None
    eps: float

    @property
    def entries(self) -> int:
        """m: entries per channel."""
        return self.input.numel() // len(self.mean)

    @property
    def scale(self) -> Tensor:
        """gamma / std, [C]."""
        return self.invstd if self.gamma is None else self.invstd * self.gamma

    def _flat(self) -> tuple[Tensor, ...]:
        """What the formulas begin with: grad_output and input, and output where there is a ReLU."""
        last = is_channels_last(self.input)
        return tuple(
            _flatten(t, last) for t in (self.grad_output, self.input, self.output) if t is not None
        )

    def sums(self) -> Sums:
        """Everything that scores and the gradients of gamma and beta are made of, in one pass."""
        given = self._flat()
        if one_pass.compiles(self.grad_output):
            formula = _plain_sums if self.output is None else _masked_sums
        else:
            formula = _sums_by_aten if self.output is None else _masked_sums_by_aten
        return Sums(*one_pass.compute_sums(formula, *given, self.mean, self.invstd, like=self.grad_output))

    def scores(self, sums: Sums | None, keep: Keep) -> Tensor:
        """One score per channel of the norm's grad_input; NaN where an entry is not finite.

        From `sums`, which are made where they are needed and not given. "random" reads nothing, and sees no
        such entry.
        """
        if keep.score == RANDOM:
            scores = torch.rand(len(self.mean), device=self.mean.device)
        elif keep.score == "l1":
            scores = self._magnitudes(sums or self.sums())
        else:
            scores = self._squares(sums or self.sums())
        return sum_over_processes(scores) if keep.sync_selection else scores

    def _magnitudes(self, sums: Sums) -> Tensor:
        shift = sums.grad / self.entries
        slope = self.invstd * sums.product / self.entries
        formula = _plain_magnitudes if self.output is None else _masked_magnitudes
        (scores,) = one_pass.compute_sums(
            formula, *self._flat(), self.mean, shift, slope, like=self.grad_output
        )
        return scores * self.scale.abs()

    def _squares(self, sums: Sums) -> Tensor:
        # sum(xhat^2) / m, which eps makes a little less than 1
        power = 1 - self.eps * self.invstd.square()
        dropped = (sums.grad.square() + (2 - power) * sums.product.square()) / self.entries
        return (sums.square - dropped).clamp_min(0) * self.scale.square()

    def part(self, fraction: float) -> NormBackward:
        """The same for the first examples, with the whole batch's mean and deviation."""
        if fraction == 1:
            return self
        return self._replace(
            grad_output=part_of(self.grad_output, fraction),
            output=None if self.output is None else part_of(self.output, fraction),
            input=part_of(self.input, fraction),
        )

    def kept_gradient(self, sums: Sums, kept: Tensor) -> Tensor:
        """The channels `kept` of the norm's grad_input, in the input's memory format: [N, k, *spatial]."""
        of_kept = Sums(*(values.index_select(0, kept) for values in sums))
        grad = self._fused_gradient(of_kept, kept)
        return self.backward_by_aten(kept)[0] if grad is None else grad

    def backward(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the norm's input, gamma and beta in the channels `kept`, from these alone."""
        if one_pass.compiles(self.grad_output):
            mean, invstd = (values.index_select(0, kept) for values in (self.mean, self.invstd))
            formula = _plain_sums_of_kept if self.output is None else _masked_sums_of_kept
            results = one_pass.call_compiled(formula, *self._flat(), kept, mean, invstd)
            sums = None if results is None else Sums(*results)
            gradient = None if sums is None else self._fused_gradient(sums, kept)
            if sums is not None and gradient is not None:
                return gradient, sums.product, sums.grad
        return self.backward_by_aten(kept)

    def _fused_gradient(self, sums: Sums, kept: Tensor) -> Tensor | None:
        """grad_input from the sums of the kept channels; None where formulas are not compiled."""
        if not one_pass.compiles(self.grad_output):
            return None
        scale, invstd = (values.index_select(0, kept) for values in (self.scale, self.invstd))
        per_entry = scale / self.entries
        constants = (
            self.mean.index_select(0, kept),
            scale,
            per_entry * sums.grad,
            per_entry * invstd * sums.product,
        )
        formula = _plain_kept if self.output is None else _masked_kept
        grad = one_pass.call_compiled(formula, *self._flat(), kept, *constants)
        if grad is None:
            return None
        n, *spatial = self.input.shape[0], *self.input.shape[2:]
        if is_channels_last(self.input):
            return grad.view(n, *spatial, len(kept)).movedim(-1, 1)
        return grad.view(n, len(kept), *spatial)

    def backward_by_aten(self, kept: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As `backward`; with `grad`, the channels `kept` of grad_output, in place of grad_output."""
        grad = wide(take_channels(self.grad_output, kept) if grad is None else grad)
        if self.output is not None:
            grad = torch.ops.aten.threshold_backward(grad, wide(take_channels(self.output, kept)), 0)
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
            grad,
            wide(take_channels(self.input, kept)),
            None if self.gamma is None else self.gamma[kept].to(self.mean.dtype),
            None,
            None,
            self.mean[kept],
            self.invstd[kept],
            True,
            self.eps,
            [True, True, True],
        )
        return gradients[0].to(self.input.dtype), gradients[1], gradients[2]


def _flatten(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.movedim(1, -1).flatten(0, -2) if channels_last else tensor.flatten(2)


# --- formulas: [N, C, positions] or [positions, C] and values per channel; float32 for half types ----


def _over(values: Tensor, tensor: Tensor) -> Tensor:
    """Values per channel, so that they broadcast over `tensor`."""
    return values[:, None] if tensor.dim() == 3 else values


def _plain_sums(grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, ...]:
    grad, input = wide(grad), wide(input)
    dims = [0, 2] if grad.dim() == 3 else [0]
    product = ((input - _over(mean, input)) * grad).sum(dims) * invstd
    return grad.sum(dims), product, grad.square().sum(dims)


def _masked_sums(
    grad: Tensor, input: Tensor, output: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, ...]:
    return _plain_sums(_masked(grad, output), input, mean, invstd)


def _masked(grad: Tensor, output: Tensor) -> Tensor:
    # as aten.threshold_backward: a NaN lets the gradient through
    return torch.where(output <= 0, torch.zeros((), dtype=grad.dtype, device=grad.device), grad)


def _plain_sums_of_kept(
    grad: Tensor, input: Tensor, kept: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, ...]:
    return _plain_sums(grad.index_select(1, kept), input.index_select(1, kept), mean, invstd)


def _masked_sums_of_kept(
    grad: Tensor, input: Tensor, output: Tensor, kept: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, ...]:
    masked = _masked(grad.index_select(1, kept), output.index_select(1, kept))
    return _plain_sums(masked, input.index_select(1, kept), mean, invstd)


def _sums_by_aten(grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, ...]:
    """As `_plain_sums`, by the kernel that batch-norm's own backward is."""
    grad, input = wide(grad), wide(input)
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        grad, input, None, None, None, mean, invstd, True, 0.0, [False, True, True]
    )
    return total, product, grad.square().sum([0, 2] if grad.dim() == 3 else [0])


def _masked_sums_by_aten(
    grad: Tensor, input: Tensor, output: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, ...]:
    masked = torch.ops.aten.threshold_backward(grad, output, 0)
    return _sums_by_aten(masked, input, mean, invstd)


def _plain_magnitudes(
    grad: Tensor, input: Tensor, mean: Tensor, shift: Tensor, slope: Tensor
) -> tuple[Tensor, ...]:
    grad, input = wide(grad), wide(input)
    dims = [0, 2] if grad.dim() == 3 else [0]
    centred = grad - _over(shift, grad) - (input - _over(mean, input)) * _over(slope, input)
    return (centred.abs().sum(dims),)


def _masked_magnitudes(
    grad: Tensor, input: Tensor, output: Tensor, mean: Tensor, shift: Tensor, slope: Tensor
) -> tuple[Tensor, ...]:
    return _plain_magnitudes(_masked(grad, output), input, mean, shift, slope)


def _plain_kept(
    grad: Tensor, input: Tensor, kept: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, slope: Tensor
) -> Tensor:
    return _kept(grad.index_select(1, kept), input.index_select(1, kept), mean, scale, shift, slope)


def _masked_kept(
    grad: Tensor,
    input: Tensor,
    output: Tensor,
    kept: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
) -> Tensor:
    masked = _masked(grad.index_select(1, kept), output.index_select(1, kept))
    return _kept(masked, input.index_select(1, kept), mean, scale, shift, slope)


def _kept(grad: Tensor, input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, slope: Tensor) -> Tensor:
    scaled = wide(grad) * _over(scale, grad) - _over(shift, grad)
    return (scaled - (wide(input) - _over(mean, input)) * _over(slope, input)).to(input.dtype)
