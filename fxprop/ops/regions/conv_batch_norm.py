"""Convolution, batch-norm and ReLU as one operator whose backward computes the kept channels alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprop.errors import OpError
from fxprop.ops.calling import autocast, check_choices, check_keep, is_dense, sparse
from fxprop.ops.convolution import CONVOLUTIONS, IntOrInts, convolution_of
from fxprop.ops.form import Form
from fxprop.ops.keep import Keep
from fxprop.ops.kernels.batch_norm import NormBackward
from fxprop.ops.kernels.handover import ChainEnd
from fxprop.ops.modules import is_plain
from fxprop.ops.regions.epilogue import Arrived, Behind, Epilogue, Some, run_region, runs_apart
from fxprop.ops.scores import wide
from fxprop.settings import KeepArgs

# the very classes: a subclass may compute something else, and SyncBatchNorm sums over processes
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# keywords of other operators
WITHOUT = ("bias_grad",)


@sparse
def conv_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.Module,
    *,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    activation: Literal["relu"] | None = None,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`norm(conv(input))`, with ReLU after it or not, whose backward computes only the kept channels.

    >>> bn = torch.nn.BatchNorm2d(64)
    >>> y = fxprop.ops.conv_batch_norm(x, weight, None, bn, padding=1, activation="relu", k=3)

    The same gradients as `relu(norm(conv2d(input, weight, bias, k=k)))` within rounding. What batch-norm
    in training mode passes back to a channel depends on that channel alone, so the scores come from sums
    over its grad_output, and its backward and ReLU's run for the kept channels only.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in `conv2d`; the weight's rank decides
            between one, two and three spatial dimensions.
        norm: a BatchNorm1d, 2d or 3d with all its state: running statistics are updated as it would.
        activation: "relu" or None.
        k, score, sync_selection, score_fraction: as in `conv2d`; select is "channel". The bias's gradient
            is the exact one, which is zero in front of batch-norm. With a fraction, the part is scored as
            if it were the batch, except for the mean and standard deviation.
        norm_grad: "full", or "kept": the norm's own parameters get a gradient in the kept channels only,
            which spares a pass over all of grad_output.
        weight_grad, chained: as in `conv2d`.

    Where the norm uses running statistics (eval mode), has hooks, or is another kind of module, on
    devices other than the CPU, where it was not measured, and under torch.compile, which fuses by itself,
    the three are simply called one after the other. Raises OpError
    for arguments it cannot take and on double backward. Sources: 1706.06197, section 3.3; 1502.03167.
    """
    keep = Keep.given("conv_batch_norm", settings, WITHOUT)
    if activation not in (None, "relu"):
        raise OpError(f"conv_batch_norm: activation={activation!r}: expected 'relu' or None")
    check_choices("conv_batch_norm", keep)
    dims = weight.dim() - 2
    if (
        runs_apart(input, keep)
        or not _fits(norm, dims)
        or input.dim() != dims + 2
        or groups == weight.shape[0]
        or is_dense(keep.larger, weight.shape[0] // groups, None, input, weight)
    ):
        kept = keep.arguments((*WITHOUT, "norm_grad"))
        output = CONVOLUTIONS[dims](input, weight, bias, stride, padding, dilation, groups, **kept)
        output = norm(output)
        return output if activation is None else F.relu(output)
    check_keep("conv_batch_norm", keep, weight)
    input, weight, bias = autocast(input, weight, bias, keep.weight_grad)
    form, input = convolution_of(dims, input, weight, stride, padding, dilation, groups, keep)
    batch_norm: Any = norm
    epilogue = _BatchNorm(batch_norm, batch_norm.eps, activation == "relu")
    return run_region(form, epilogue, keep, input, weight, bias, batch_norm.weight, batch_norm.bias)


def reads_part(norm_grad: str, score_fraction: float) -> bool:
    """Whether the backward reads only a part of its grad_output, so that no more need be computed."""
    return norm_grad == "kept" and score_fraction < 1


def _fits(norm: nn.Module, dims: int) -> bool:
    """Whether the backward here is that of `norm`: batch statistics, and nothing else."""
    if not is_plain(norm, (NORMS[dims - 1],)):
        return False
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _normalise(output: Tensor, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The norm's output, and mean and 1 / std of the batch; mirrors `_BatchNorm.forward` of torch.nn."""
    factor = 0.0 if norm.momentum is None else norm.momentum
    updates = norm.training and norm.track_running_stats
    if updates and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    norm._check_input_dim(output)
    if output.numel() == output.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {output.size()}"
        )
    # what F.batch_norm calls; the same function also hands out the statistics that the backward needs
    normalised, mean, invstd, _, _ = torch._batch_norm_impl_index(
        output,
        norm.weight,
        norm.bias,
        norm.running_mean if updates else None,
        norm.running_var if updates else None,
        True,
        factor,
        norm.eps,
        torch.backends.cudnn.enabled,
    )
    return normalised, mean, invstd


@dataclass(frozen=True)
class _BatchNorm(Epilogue):
    """The norm as an epilogue, with gamma and beta as its own tensors; see `regions/epilogue.py`."""

    norm: Any
    eps: float
    relu: bool

    def forward(self, features: Tensor, *own: Tensor | None) -> tuple[Tensor, ...]:
        output, mean, invstd = _normalise(features, self.norm)
        return output.relu_() if self.relu else output, features, mean, invstd

    def saved(self, own: Some, outputs: tuple[Tensor, ...]) -> Some:
        gamma, _ = own
        output, features, mean, invstd = outputs
        # sums are of float32 also where all of the model is of a half type
        return gamma, features, wide(mean), wide(invstd), output if self.relu else None

    def chain(self, keep: Keep) -> ChainEnd | None:
        partial = reads_part(keep.norm_grad, keep.score_fraction)
        return ChainEnd(_choose, keep.score_fraction) if partial else None

    def behind(self, form: Form, keep: Keep, of: Arrived) -> Behind:
        gamma, features, mean, invstd, output = of.saved
        assert features is not None
        assert mean is not None
        assert invstd is not None
        norm = NormBackward(of.grad_output, output, features, mean, invstd, gamma, self.eps)
        handed = None if of.chain is None else of.chain.take(of.grad_output)
        # the norm subtracts the mean, and with it whatever a bias adds
        grad_bias = of.weight.new_zeros(len(mean)) if of.needs_bias else None
        kept = grad = None
        if keep.norm_grad == "kept":
            if handed is None:
                kept = form.top(norm.part(keep.score_fraction).scores(None, keep), int(keep.k))
                grad, kept_gamma, kept_beta = norm.backward(kept)
            else:
                kept = handed.kept
                grad, kept_gamma, kept_beta = norm.backward_by_aten(kept, handed.grad)
            product = torch.zeros_like(mean).index_copy_(0, kept, kept_gamma)
            total = torch.zeros_like(mean).index_copy_(0, kept, kept_beta)
        else:
            sums = norm.sums()
            product, total = sums.product, sums.grad
            if any(of.needed):
                part = norm.part(keep.score_fraction)
                kept = form.top(part.scores(sums if part is norm else None, keep), int(keep.k))
                grad = norm.kept_gradient(sums, kept)
        if gamma is not None:
            product, total = product.to(gamma.dtype), total.to(gamma.dtype)
        own = product if of.needs_own[0] else None, total if of.needs_own[1] else None
        return Behind(kept, grad, grad_bias, own)


def _choose(ctx: Any, grad_output: Tensor) -> Tensor:
    """The channels that the region of `ctx` keeps, by the grad_output of the first examples."""
    _, _, gamma, features, mean, invstd, output = ctx.chain.look(ctx)
    first = slice(len(grad_output))
    part = None if output is None else output[first]
    norm = NormBackward(grad_output, part, features[first], mean, invstd, gamma, ctx.epilogue.eps)
    kept: Tensor = ctx.form.top(norm.scores(None, ctx.keep), int(ctx.keep.larger.k))
    return kept
