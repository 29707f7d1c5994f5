"""Convolution, group norm and activation as one operator whose backward writes the kept channels alone.

Group norm's backward (Wu and He, 1803.08494), for each example and group of m entries:

    grad_input = invstd * (gamma * g - sum(gamma * g) / m - xhat * sum(gamma * g * xhat) / m)

with g the gradient behind the activation and xhat the normalised input. Its two sums are those of the
group's channels, of which gamma's and beta's own gradients are made as well; so one pass gives the sums,
and only the kept channels of grad_input are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from fxprop.errors import OpError
from fxprop.ops.activations import ACTIVATIONS, BACKWARDS, Activation
from fxprop.ops.calling import check_choices, check_keep, is_dense, sparse
from fxprop.ops.convolution import CONVOLUTIONS, IntOrInts, convolution_of
from fxprop.ops.form import Form
from fxprop.ops.function import autocast_device
from fxprop.ops.keep import Keep
from fxprop.ops.kernels.layout import is_channels_last, take_channels
from fxprop.ops.modules import is_plain
from fxprop.ops.regions.epilogue import Arrived, Behind, Epilogue, Some, run_region, runs_apart
from fxprop.ops.scores import RANDOM, count_of, sum_over_processes
from fxprop.settings import KeepArgs

# keywords of other operators
WITHOUT = ("norm_grad",)


@sparse
def conv_group_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.Module,
    *,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    activation: Activation | None = None,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`activation(norm(conv(input)))`, whose backward writes only the kept channels.

    >>> gn = torch.nn.GroupNorm(8, 64)
    >>> y = fxprop.ops.conv_group_norm(x, weight, None, gn, padding=1, activation="silu", k=3)

    The same gradients as `silu(norm(conv2d(input, weight, bias, k=k)))` within rounding.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in `conv2d`; the weight's rank decides
            between one, two and three spatial dimensions. float64/32; half types and autocast run the three
            one after the other.
        norm: a GroupNorm.
        activation: "relu", "gelu", "gelu_tanh" (gelu with approximate="tanh"), "silu" or None.
        k, score, sync_selection, score_fraction, bias_grad, weight_grad, chained: as in `conv2d`; select is
            "channel".

    On devices other than the CPU, where it was not measured, under torch.compile, which fuses by itself,
    and where the norm has hooks, the three are called one after the other. Raises OpError for arguments it
    cannot take and on double backward. Sources: 1706.06197, section 3.3; 1803.08494.
    """
    keep = Keep.given("conv_group_norm", settings, WITHOUT)
    if activation is not None and activation not in ACTIVATIONS:
        raise OpError(
            f"conv_group_norm: activation={activation!r}: expected one of {', '.join(ACTIVATIONS)} or None"
        )
    check_choices("conv_group_norm", keep)
    dims = weight.dim() - 2
    if (
        runs_apart(input, keep)
        or torch.is_autocast_enabled(autocast_device(input))
        or input.dtype not in (torch.float32, torch.float64)
        or not is_plain(norm, (nn.GroupNorm,))
        or input.dim() != dims + 2
        or groups == weight.shape[0]
        or is_dense(keep.larger, weight.shape[0] // groups, None, input, weight)
    ):
        kept = keep.arguments(WITHOUT)
        output = CONVOLUTIONS[dims](input, weight, bias, stride, padding, dilation, groups, **kept)
        output = norm(output)
        return output if activation is None else ACTIVATIONS[activation](output)
    check_keep("conv_group_norm", keep, weight)
    form, input = convolution_of(dims, input, weight, stride, padding, dilation, groups, keep)
    group_norm: Any = norm
    epilogue = _GroupNorm(group_norm.num_groups, group_norm.eps, activation)
    return run_region(form, epilogue, keep, input, weight, bias, group_norm.weight, group_norm.bias)


class _Sums(NamedTuple):
    """Over the entries of each example's channel, [N, C] each: of g and of g * xhat."""

    grad: Tensor
    product: Tensor


class _Terms(NamedTuple):
    """grad_input = scale * g - shift - slope * input, [N, C] each."""

    scale: Tensor
    shift: Tensor
    slope: Tensor


@dataclass(frozen=True)
class _GroupNorm(Epilogue):
    """The norm as an epilogue, with gamma and beta as its own tensors; see `regions/epilogue.py`."""

    groups: int
    eps: float
    activation: str | None

    def forward(self, features: Tensor, *own: Tensor | None) -> tuple[Tensor, ...]:
        (gamma, beta), (n, channels, *spatial) = own, features.shape
        # what F.group_norm calls; it hands out the statistics that the backward needs
        output, mean, invstd = torch.native_group_norm(
            features, gamma, beta, n, channels, math.prod(spatial), self.groups, self.eps
        )
        if self.activation is None:
            return output, features, mean, invstd
        if self.activation == "relu":  # whose backward can be told from its output
            return output.relu_(), features, mean, invstd
        return ACTIVATIONS[self.activation](output), features, mean, invstd, output

    def saved(self, own: Some, outputs: tuple[Tensor, ...]) -> Some:
        result, features, mean, invstd, *before = outputs
        behind_norm = None if self.activation is None else before[0] if before else result
        return own[0], features, mean, invstd, behind_norm

    def behind(self, form: Form, keep: Keep, of: Arrived) -> Behind:
        gamma, features, mean, invstd, before = of.saved
        assert features is not None
        assert mean is not None
        assert invstd is not None
        norm = _Backward(of.grad_output, before, features, mean, invstd, gamma, self)
        sums = norm.sums()
        terms = norm.terms(sums)
        grad_bias = (
            norm.sum_of_gradient(sums, terms) if of.needs_bias and keep.bias_grad == "full" else None
        )
        own = (
            sums.product.sum(0) if of.needs_own[0] else None,
            sums.grad.sum(0) if of.needs_own[1] else None,
        )
        if not (any(of.needed) or (of.needs_bias and grad_bias is None)):
            return Behind(None, None, grad_bias, own)
        kept = form.top(norm.scores(terms, keep), int(keep.k))
        grad = norm.gradient(terms, slice(None), kept)
        if of.needs_bias and grad_bias is None:
            grad_bias = form.bias(grad, kept, of.weight, of.weight.shape[:1])
        return Behind(kept, grad, grad_bias, own)


class _Backward(NamedTuple):
    grad_output: Tensor
    # the activation's input (of ReLU its output); None where there is no activation
    before: Tensor | None
    input: Tensor
    # [N, groups]
    mean: Tensor
    invstd: Tensor
    gamma: Tensor | None
    norm: _GroupNorm

    def _through(self, at: tuple[Any, ...]) -> Tensor:
        """The gradient behind the activation, of some examples and channels."""
        grad = _at(self.grad_output, at)
        if self.before is None or self.norm.activation is None:
            return grad
        return BACKWARDS[self.norm.activation](grad, _at(self.before, at))

    def sums(self) -> _Sums:
        """Example by example, so that all but the sums stays in the cache."""
        channels, positions = self.input.shape[1], math.prod(self.input.shape[2:])
        per_example = []
        # not gamma, so that these do not depend on the channels' scale; torch 2.11 takes no None
        ones = self.input.new_ones(channels)
        for i in range(len(self.input)):
            one = slice(i, i + 1)
            _, product, total = torch.ops.aten.native_group_norm_backward(
                self._through((one, None)),
                *(self.input[one], self.mean[one], self.invstd[one]),
                ones,
                *(1, channels, positions, self.norm.groups),
                # grad_input is asked for where torch 2.11 crashes without it
                [is_channels_last(self.input), True, True],
            )
            per_example.append((total, product))
        return _Sums(*(torch.stack(of) for of in zip(*per_example, strict=True)))

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.input.shape[1] // self.norm.groups, 1)

    def terms(self, sums: _Sums) -> _Terms:
        n, gamma = len(self.input), 1.0 if self.gamma is None else self.gamma
        m = self.input[0].numel() // self.norm.groups
        of_groups = [(gamma * values).view(n, self.norm.groups, -1).sum(2) / m for values in sums]
        invstd, mean, total, product = map(self._per_channel, (self.invstd, self.mean, *of_groups))
        slope = invstd.square() * product
        return _Terms(invstd * gamma, invstd * total - slope * mean, slope)

    def sum_of_gradient(self, sums: _Sums, terms: _Terms) -> Tensor:
        """Of grad_input, over each channel."""
        positions = math.prod(self.input.shape[2:])
        inputs = self.input.sum(tuple(range(2, self.input.dim())))
        return (terms.scale * sums.grad - terms.shift * positions - terms.slope * inputs).sum(0)

    def gradient(self, terms: _Terms, examples: slice, kept: Tensor | None) -> Tensor:
        """grad_input of some examples, in the channels `kept` (None: in all)."""
        at, over_positions = (examples, kept), (..., *(None,) * (self.input.dim() - 2))
        taken = (of[examples] if kept is None else of[examples].index_select(1, kept) for of in terms)
        scale, shift, slope = (of[over_positions] for of in taken)
        return torch.addcmul(self._through(at) * scale - shift, _at(self.input, at), slope, value=-1)

    def scores(self, terms: _Terms, keep: Keep) -> Tensor:
        """One score per channel of grad_input, from the first `score_fraction` of the examples."""
        n, channels = self.input.shape[:2]
        if keep.score == RANDOM:
            scores = torch.rand(channels, device=self.input.device)
        else:
            scores = terms.scale.new_zeros(channels)
            for i in range(count_of(keep.score_fraction, n)):
                grad = self.gradient(terms, slice(i, i + 1), None)
                powers = grad.square_() if keep.score == "l2" else grad.abs_()
                scores += powers.sum((0, *range(2, powers.dim())))
        return sum_over_processes(scores) if keep.sync_selection else scores


def _at(tensor: Tensor, at: tuple[slice, Tensor | None]) -> Tensor:
    examples, kept = at
    return tensor[examples] if kept is None else take_channels(tensor[examples], kept)
