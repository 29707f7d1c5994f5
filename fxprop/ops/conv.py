"""The sparse convolution operators: `torch.nn.functional.conv{1,2,3}d` with meProp's backward.

Layouts: input [N, C_in, *spatial] or unbatched [C_in, *spatial], weight [C_out, C_in/groups, *kernel],
grad_output [N, C_out, *spatial_out].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from fxprop.ops.chain import upstream_of
from fxprop.ops.common import autocast, check_keep, needs_backward, sparse
from fxprop.ops.conv_backward import Geometry, SparseConv
from fxprop.ops.select import Keep
from fxprop.settings import KeepArgs

IntOrInts = int | Sequence[int]


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


def _convolve(
    name: str,
    dense: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    keep: Keep,
) -> Tensor:
    check_keep(name, keep, weight)
    dense_by_k = keep.select == "channel" and keep.k >= _channels_to_select_from(weight, groups)
    if dense_by_k or not needs_backward(input, weight, bias):
        return dense(input, weight, bias, stride, padding, dilation, groups)
    input, weight, bias = autocast(input, weight, bias, keep.weight_grad)
    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
    dilations = expand(dilation, dims)
    input, paddings = resolve_padding(input, weight, padding, dilations)
    geometry = Geometry(expand(stride, dims), paddings, dilations, groups)
    output: Tensor = SparseConv.apply(input, weight, bias, geometry, keep, upstream_of(input, keep))
    return output.squeeze(0) if unbatched else output


def _channels_to_select_from(weight: Tensor, groups: int) -> int:
    out_channels = weight.shape[0]
    return out_channels if groups == out_channels else out_channels // groups


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
    keep = Keep.given("conv1d", settings)
    return _convolve("conv1d", F.conv1d, 1, input, weight, bias, stride, padding, dilation, groups, keep)


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
        select: "channel" keeps the same k output channels of every group for the whole batch (for
            groups = C_out: k channels with their groups) and computes with the smaller tensors.
            "element" keeps the top-k of each example's flattened C_out x H x W; the rest is masked and
            the dense kernels run, so nothing is saved on the clock.
        score: "l1", "l2", "random" or a registered name.
        bias_grad: "full" sums all of grad_output, "selected" only what was kept.
        weight_grad: "dense", or "row_sparse": with "channel", the weight's gradient is a sparse tensor with
            the kept rows, as `nn.Embedding(sparse=True)` has it. The weight must be a parameter itself.
        chained: the caller's word that the input comes from `conv_batch_norm` and is used here alone. Where
            that reads only part of its grad_output, no more of it is computed; the same gradients.

    The output is bit-equal to the dense operator's. Raises OpError for arguments it cannot take and on
    double backward. Source: Wei et al., 1709.05804 ("element"); meProp's unified form, 1706.06197,
    section 3.3, applied to output channels ("channel").
    """
    keep = Keep.given("conv2d", settings)
    return _convolve("conv2d", F.conv2d, 2, input, weight, bias, stride, padding, dilation, groups, keep)


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
    keep = Keep.given("conv3d", settings)
    return _convolve("conv3d", F.conv3d, 3, input, weight, bias, stride, padding, dilation, groups, keep)
