"""Convolution, batch-norm and ReLU as one operator whose backward computes the kept channels alone."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprop.errors import OpError
from fxprop.ops import conv
from fxprop.ops.chain import ChainEnd, upstream_of
from fxprop.ops.common import (
    SparseFunction,
    autocast,
    autocast_device,
    check_choices,
    check_keep,
    needs_backward,
    refuse_double_backward,
    sparse,
)
from fxprop.ops.conv_backward import Geometry, from_kept
from fxprop.ops.norm_backward import SCORES, NormBackward
from fxprop.ops.select import Keep, top_channels
from fxprop.settings import KeepArgs

Activation = Literal["relu"]

_CONVS = {1: conv.conv1d, 2: conv.conv2d, 3: conv.conv3d}
# the very classes: a subclass may compute something else, and SyncBatchNorm sums over processes
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@sparse
def conv_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.Module,
    *,
    stride: conv.IntOrInts = 1,
    padding: conv.IntOrInts | str = 0,
    dilation: conv.IntOrInts = 1,
    groups: int = 1,
    activation: Activation | None = None,
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
            if it were the batch, but for the mean and standard deviation.
        norm_grad: "full", or "kept": the norm's own parameters get a gradient in the kept channels only,
            which spares a pass over all of grad_output.
        weight_grad, chained: as in `conv2d`.

    Where the norm uses running statistics (eval mode), has hooks, or is another kind of module, on
    devices other than the CPU, where it was not measured, and under torch.compile, which fuses by itself,
    the three are simply called one after the other. Raises OpError
    for arguments it cannot take and on double backward. Sources: 1706.06197, section 3.3; 1502.03167.
    """
    keep = Keep.given("conv_batch_norm", settings, ("bias_grad",))
    if activation not in (None, "relu"):
        raise OpError(f"conv_batch_norm: activation={activation!r}: expected 'relu' or None")
    check_choices("conv_batch_norm", keep)
    dims = weight.dim() - 2
    if (
        input.device.type != "cpu"
        or torch.compiler.is_compiling()
        or not _fits(norm, dims)
        or input.dim() != dims + 2
        or keep.k >= weight.shape[0] // groups
        or keep.select != "channel"
        or keep.score not in SCORES
        or groups == weight.shape[0]
        or not needs_backward(input, weight)
    ):
        output = _CONVS[dims](
            input, weight, bias, stride, padding, dilation, groups, **keep.arguments(takes_bias=False)
        )
        output = norm(output)
        return output if activation is None else F.relu(output)
    check_keep("conv_batch_norm", keep, weight)
    input, weight, bias = autocast(input, weight, bias, keep.weight_grad)
    dilations = conv.expand(dilation, dims)
    input, paddings = conv.resolve_padding(input, weight, padding, dilations)
    geometry = Geometry(conv.expand(stride, dims), paddings, dilations, groups)
    outputs = _SparseConvNorm.apply(
        input,
        weight,
        bias,
        norm.weight,
        norm.bias,
        norm,
        geometry,
        activation,
        keep,
        upstream_of(input, keep),
    )
    result: Tensor = outputs[0]
    return result


def _fits(norm: nn.Module, dims: int) -> bool:
    """Whether `norm` is what the backward here is that of: batch statistics, and nothing besides."""
    if type(norm) is not NORMS[dims - 1]:
        return False
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    uses_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
    return uses_batch and not any(hooks) and "forward" not in vars(norm)


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


class _SparseConvNorm(SparseFunction):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        norm: Any,
        geometry: Geometry,
        activation: Activation | None,
        keep: Keep,
        upstream: Any | None,
    ) -> tuple[Tensor, ...]:
        convolved = torch.convolution(input, weight, bias, *geometry.arguments(geometry.groups))
        output, mean, invstd = _normalise(convolved, norm)
        return (output if activation is None else output.relu_(), convolved, mean, invstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, _, gamma, _, norm, ctx.geometry, activation, keep, ctx.upstream = inputs
        result, convolved, mean, invstd = output
        ctx.keep, ctx.eps = keep, norm.eps
        # with less to read, what lies downstream can compute less
        partial = keep.norm_grad == "kept" and keep.score_fraction < 1
        ctx.chain = ChainEnd(_choose, keep.score_fraction) if partial else None
        ctx.mark_non_differentiable(convolved, mean, invstd)
        # or autograd would fill a tensor with zeros for each of them
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            input, weight, gamma, convolved, mean, invstd, None if activation is None else result
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 10
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            grads = _backward(ctx, grad_output)
        input, weight, gamma, *_ = ctx.saved_tensors
        used = (grad_output, input, weight, *(() if gamma is None else (gamma,)))
        return (*refuse_double_backward(grads, used), None, None, None, None, None)


def _top(norm: NormBackward, ctx: Any) -> Tensor:
    return top_channels(norm.scores(None, ctx.keep), ctx.geometry.groups, ctx.keep.k)


def _choose(ctx: Any, grad_output: Tensor) -> Tensor:
    """The channels that the region of `ctx` keeps, by the grad_output of the first examples."""
    _, _, gamma, convolved, mean, invstd, output = ctx.saved_tensors
    first = slice(len(grad_output))
    part = None if output is None else output[first]
    return _top(NormBackward(grad_output, part, convolved[first], mean, invstd, gamma, ctx.eps), ctx)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, gamma, convolved, mean, invstd, output = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_gamma, needs_beta = ctx.needs_input_grad[:5]
    norm = NormBackward(grad_output, output, convolved, mean, invstd, gamma, ctx.eps)
    handed = None if ctx.chain is None else ctx.chain.take(grad_output)
    keep, groups = ctx.keep, ctx.geometry.groups
    # the norm subtracts the mean, and with it whatever a bias adds
    grad_bias = weight.new_zeros(len(mean)) if needs_bias else None
    wanted = (needs_input, needs_weight)
    if keep.norm_grad == "kept":
        if handed is None:
            kept = _top(norm.part(keep.score_fraction), ctx)
            grad, kept_gamma, kept_beta = norm.backward(kept)
        else:
            kept = handed.kept
            grad, kept_gamma, kept_beta = norm.by_aten(kept, handed.grad)
        product = torch.zeros_like(mean).index_copy_(0, kept, kept_gamma)
        total = torch.zeros_like(mean).index_copy_(0, kept, kept_beta)
        grad_input, grad_weight = from_kept(
            grad, kept, input, weight, ctx.geometry, keep, wanted, ctx.upstream
        )
    else:
        sums = norm.sums()
        product, total = sums.product, sums.grad
        grad_input = grad_weight = None
        if any(wanted):
            part = norm.part(keep.score_fraction)
            scores = part.scores(sums if part is norm else None, keep)
            kept = top_channels(scores, groups, keep.k)
            grad = norm.kept_gradient(sums, kept)
            grad_input, grad_weight = from_kept(
                grad, kept, input, weight, ctx.geometry, keep, wanted, ctx.upstream
            )
    return (
        grad_input,
        grad_weight,
        grad_bias,
        product.to(gamma.dtype) if needs_gamma else None,
        total.to(gamma.dtype) if needs_beta else None,
    )
