"""The sparse transposed convolutions: `torch.nn.functional.conv_transpose{1,2,3}d` with meProp's backward.

Layouts: input [N, C_in, *spatial] or unbatched [C_in, *spatial], weight [C_in, C_out/groups, *kernel],
grad_output [N, C_out, *spatial_out].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from fxprop.ops.common import autocast, check_keep, needs_backward, sparse
from fxprop.ops.conv import IntOrInts, expand
from fxprop.ops.conv_backward import Geometry, SparseConv
from fxprop.ops.select import Keep
from fxprop.settings import KeepArgs

# the kept channels are no rows of the weight
_WITHOUT = ("norm_grad", "weight_grad", "chained")


def _convolve(
    name: str,
    dense: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts,
    output_padding: IntOrInts,
    groups: int,
    dilation: IntOrInts,
    keep: Keep,
) -> Tensor:
    check_keep(name, keep, weight)
    per_group = weight.shape[1]
    to_select_from = groups if per_group == 1 else per_group
    dense_by_k = keep.select == "channel" and keep.k >= to_select_from
    if dense_by_k or not needs_backward(input, weight, bias):
        return dense(input, weight, bias, stride, padding, output_padding, groups, dilation)
    input, weight, bias = autocast(input, weight, bias)
    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
    geometry = Geometry(
        expand(stride, dims),
        expand(padding, dims),
        expand(dilation, dims),
        groups,
        transposed=True,
        output_padding=expand(output_padding, dims),
    )
    output: Tensor = SparseConv.apply(input, weight, bias, geometry, keep)
    return output.squeeze(0) if unbatched else output


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
    keep = Keep.given("conv_transpose1d", settings, _WITHOUT)
    return _convolve(
        "conv_transpose1d",
        F.conv_transpose1d,
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        keep,
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
    keep = Keep.given("conv_transpose2d", settings, _WITHOUT)
    return _convolve(
        "conv_transpose2d",
        F.conv_transpose2d,
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        keep,
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
    keep = Keep.given("conv_transpose3d", settings, _WITHOUT)
    return _convolve(
        "conv_transpose3d",
        F.conv_transpose3d,
        3,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        keep,
    )
