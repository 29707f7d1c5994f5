"""The sparse convolution operators: `torch.nn.functional.conv{1,2,3}d`, and the transposed ones.

Layouts: input [N, C_in, *spatial] or unbatched [C_in, *spatial], weight [C_out, C_in/groups, *kernel] (of
transposed ones [C_in, C_out/groups, *kernel]), grad_output [N, C_out, *spatial_out].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from fxprop.ops.axes import channel_runs
from fxprop.ops.calling import autocast, check_keep, is_dense, sparse
from fxprop.ops.engine import run
from fxprop.ops.keep import Keep
from fxprop.ops.kernels.convolution import Convolution
from fxprop.ops.kernels.handover import upstream_of
from fxprop.settings import KeepArgs

IntOrInts = int | Sequence[int]

# keywords of other operators; the kept channels of a transposed convolution are no rows of its weight
WITHOUT = ("norm_grad",)
WITHOUT_TRANSPOSED = ("norm_grad", "weight_grad", "chained")


def expand(value: IntOrInts, dims: int) -> list[int]:
    """One number per spatial dimension."""
    if isinstance(value, int):
        return [value] * dims
    values = list(value)
    return values * dims if len(values) == 1 else values


def resolve_padding(
    input: Tensor, weight: Tensor, padding: IntOrInts | str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Numeric padding, and the input it applies to; mirrors aten's `_convolution_same`.

    An even kernel needs one more element at the end: aten pads that one explicitly and leaves the rest
    to the kernel.
    """
    dims = len(dilation)
    if padding == "valid":
        return input, [0] * dims
    if not isinstance(padding, str):
        return input, expand(padding, dims)
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    extra = [amount % 2 for amount in total]
    if any(extra):
        pad = [side for amount in reversed(extra) for side in (0, amount)]
        input = F.pad(input, pad)
    return input, [amount // 2 for amount in total]


def convolution_of(
    dims: int,
    input: Tensor,
    weight: Tensor,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    keep: Keep,
) -> tuple[Convolution, Tensor]:
    """The call as the backward knows it, and the input, padded where the kernels cannot."""
    dilations = expand(dilation, dims)
    input, paddings = resolve_padding(input, weight, padding, dilations)
    upstream = upstream_of(input, keep)
    return Convolution(expand(stride, dims), paddings, dilations, groups, False, None, upstream), input


def _convolve(
    name: str,
    dense: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    settings: KeepArgs,
) -> Tensor:
    keep = Keep.given(name, settings, WITHOUT)
    check_keep(name, keep, weight)
    _, n = channel_runs(groups, weight.shape[0] // groups)
    if is_dense(keep, n, None, input, weight, bias):
        return dense(input, weight, bias, stride, padding, dilation, groups)
    input, weight, bias = autocast(input, weight, bias, keep.weight_grad)
    unbatched = input.dim() == weight.dim() - 1
    if unbatched:
        input = input.unsqueeze(0)
    form, input = convolution_of(weight.dim() - 2, input, weight, stride, padding, dilation, groups, keep)
    output = run(form, keep, input, weight, bias)
    return output.squeeze(0) if unbatched else output


def _convolve_transposed(
    name: str,
    dense: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    constants: tuple[IntOrInts, IntOrInts, IntOrInts, int, IntOrInts],
    settings: KeepArgs,
) -> Tensor:
    keep = Keep.given(name, settings, WITHOUT_TRANSPOSED)
    stride, padding, output_padding, groups, dilation = constants
    check_keep(name, keep, weight)
    _, n = channel_runs(groups, weight.shape[1])
    if is_dense(keep, n, None, input, weight, bias):
        return dense(input, weight, bias, *constants)
    input, weight, bias = autocast(input, weight, bias)
    dims = weight.dim() - 2
    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
    stride, padding, dilation = (expand(value, dims) for value in (stride, padding, dilation))
    form = Convolution(stride, padding, dilation, groups, True, expand(output_padding, dims), None)
    output = run(form, keep, input, weight, bias)
    return output.squeeze(0) if unbatched else output


@sparse
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.nn.functional.conv1d` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.conv1d(x, weight, bias, padding=1, k=3)    # 3 of weight.shape[0] output channels

    input [N, C_in, L] or [C_in, L], weight [C_out, C_in/groups, kL]; dtypes, `select`,
    `score`, `bias_grad`, `weight_grad`, `chained`, errors and sources as in `conv2d`.
    """
    return _convolve("conv1d", F.conv1d, input, weight, bias, stride, padding, dilation, groups, settings)


@sparse
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.nn.functional.conv2d` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.conv2d(x, weight, bias, padding=1, k=3)    # 3 of weight.shape[0] output channels
    >>> y = fxprop.ops.conv2d(x, weight, k=500, select="element")

    Args:
        input: [N, C_in, H, W] or [C_in, H, W]; float64/32, bfloat16 or float16.
        weight: [C_out, C_in/groups, kH, kW].
        bias: [C_out] or None.
        stride, padding, dilation, groups: as for the dense operator, "same" and "valid" included.
        k: how many to keep; k >= n is the dense operator.
        k_input, k_weight: how many for the input's gradient and for the weight's, where that is not k; with
            0 there is none. The bias's goes by bias_grad, and "selected" is the weight's.
        select: "channel" keeps the same k output channels of every group for the whole batch (for
            groups = C_out: k channels with their groups) and computes with the smaller tensors.
            "element" keeps the top-k of each example's flattened C_out x H x W, and computes with these
            alone where numba is installed and that is faster; elsewhere the rest is masked and the dense
            kernels run. "nonzero" drops nothing, and skips zeros where few entries are left.
        score: "l1", "l2", "random" or a registered name.
        score_weight: with "channel" and "l2", rank for the input's gradient by the norms times those of the
            channels' weights.
        bias_grad: "full" sums all of grad_output, "selected" only what was kept.
        weight_grad: "dense", or "row_sparse": with "channel", the weight's gradient is a sparse tensor with
            the kept rows, as `nn.Embedding(sparse=True)` has it. The weight must be a parameter itself.
        chained: the caller promises that the input comes from `conv_batch_norm` and is used only here.
            Where that reads only part of its grad_output, no more of it is computed; the gradients are the
            same.

    The output is bit-equal to the dense operator's. Raises OpError for arguments it cannot take and on
    double backward. Source: Wei et al., 1709.05804 ("element"); meProp's unified form, 1706.06197,
    section 3.3, applied to output channels ("channel").
    """
    return _convolve("conv2d", F.conv2d, input, weight, bias, stride, padding, dilation, groups, settings)


@sparse
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.nn.functional.conv3d` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.conv3d(x, weight, bias, padding=1, k=3)    # 3 of weight.shape[0] output channels

    input [N, C_in, D, H, W] or [C_in, D, H, W], weight [C_out, C_in/groups, kD, kH, kW]; dtypes, `select`,
    `score`, `bias_grad`, `weight_grad`, `chained`, errors and sources as in `conv2d`.
    """
    return _convolve("conv3d", F.conv3d, input, weight, bias, stride, padding, dilation, groups, settings)


# by spatial dimensions
CONVOLUTIONS = {1: conv1d, 2: conv2d, 3: conv3d}


@sparse
def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.conv_transpose1d(x, weight, bias, stride=2, k=3)    # 3 output channels per group

    input [N, C_in, L] or [C_in, L], weight [C_in, C_out/groups, kL]; the rest as in
    `fxprop.ops.conv2d`. "channel" keeps k of the C_out/groups output channels of every group; where that
    is 1, k channels with their groups.
    """
    constants = (stride, padding, output_padding, groups, dilation)
    return _convolve_transposed(
        "conv_transpose1d", F.conv_transpose1d, input, weight, bias, constants, settings
    )


@sparse
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.conv_transpose2d(x, weight, bias, stride=2, k=3)    # 3 output channels per group

    input [N, C_in, H, W] or [C_in, H, W], weight [C_in, C_out/groups, kH, kW]; the rest as in
    `fxprop.ops.conv2d`. "channel" keeps k of the C_out/groups output channels of every group; where that
    is 1, k channels with their groups.
    """
    constants = (stride, padding, output_padding, groups, dilation)
    return _convolve_transposed(
        "conv_transpose2d", F.conv_transpose2d, input, weight, bias, constants, settings
    )


@sparse
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.nn.functional.conv_transpose3d` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.conv_transpose3d(x, weight, bias, stride=2, k=3)    # 3 output channels per group

    input [N, C_in, D, H, W] or [C_in, D, H, W], weight [C_in, C_out/groups, kD, kH, kW]; the rest as in
    `fxprop.ops.conv2d`. "channel" keeps k of the C_out/groups output channels of every group; where that
    is 1, k channels with their groups.
    """
    constants = (stride, padding, output_padding, groups, dilation)
    return _convolve_transposed(
        "conv_transpose3d", F.conv_transpose3d, input, weight, bias, constants, settings
    )
