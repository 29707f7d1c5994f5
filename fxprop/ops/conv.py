"""The sparse convolution operators: `torch.nn.functional.conv{1,2,3}d` with meProp's backward.

Layouts: input [N, C_in, *spatial] or unbatched [C_in, *spatial], weight [C_out, C_in/groups, *kernel],
grad_output [N, C_out, *spatial_out].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxprop.ops import pointwise
from fxprop.ops.common import (
    Keep,
    autocast,
    check_keep,
    needs_backward,
    public,
    refuse_double_backward,
)
from fxprop.ops.select import mask_elements, select_channels
from fxprop.plan import BiasGrad, Select

IntOrInts = int | Sequence[int]


class _Geometry(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, keep: Keep
    ) -> Tensor:
        stride, padding, dilation, groups = geometry
        return torch.convolution(
            input, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.geometry, ctx.keep = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(grad_output.device.type, enabled=False):
            grads = _backward(grad_output, input, weight, ctx.geometry, ctx.keep, ctx.needs_input_grad)
        return (*refuse_double_backward(grads), None, None)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: _Geometry,
    keep: Keep,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_input, needs_weight, needs_bias = needs[:3]
    out_channels, groups = weight.shape[0], geometry.groups
    summed = (0, *range(2, grad_output.dim()))
    grad_bias = None
    if needs_bias and keep.bias_grad == "full":
        grad_bias = grad_output.sum(summed)
        needs_bias = False
    if not (needs_input or needs_weight or needs_bias):
        return None, None, grad_bias

    if keep.select == "element":
        flat = mask_elements(grad_output.flatten(1), keep.k, keep.score)
        grad = flat.view(grad_output.shape)
        grad_input, grad_weight = _dense(grad, input, weight, geometry, groups, needs_input, needs_weight)
        if needs_bias:
            grad_bias = grad.sum(summed)
        return grad_input, grad_weight, grad_bias

    depthwise = groups == out_channels
    kept = select_channels(grad_output, 1, 1 if depthwise else groups, keep.k, keep.score)
    grad = grad_output.index_select(1, kept)
    kept_weight = weight.index_select(0, kept)
    if depthwise and groups > 1:
        # a dropped channel drops its whole group, so its input channels are not read either
        per_group = weight.shape[1]
        kept_in = kept
        if per_group > 1:
            within = torch.arange(per_group, device=kept.device)
            kept_in = (kept[:, None] * per_group + within).flatten()
        grad_input, grad_weight = _dense(
            grad,
            input.index_select(1, kept_in),
            kept_weight,
            geometry,
            keep.k,
            needs_input,
            needs_weight,
        )
        if grad_input is not None:
            grad_input = torch.zeros_like(input).index_copy_(1, kept_in, grad_input)
    elif pointwise.applies(input, weight, geometry.padding, groups):
        grad_input, grad_weight = pointwise.gradients(
            grad, input, kept_weight, geometry.stride, needs_input, needs_weight
        )
    else:
        grad_input, grad_weight = _dense(
            grad, input, kept_weight, geometry, groups, needs_input, needs_weight
        )
    if grad_weight is not None:
        grad_weight = torch.zeros_like(weight).index_copy_(0, kept, grad_weight)
    if needs_bias:
        grad_bias = grad.new_zeros(out_channels).index_copy_(0, kept, grad.sum(summed))
    return grad_input, grad_weight, grad_bias


def _dense(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: _Geometry,
    groups: int,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input and grad_weight by the ordinary kernel."""
    if not (needs_input or needs_weight):
        return None, None
    stride, padding, dilation, _ = geometry
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [needs_input, needs_weight, False],
    )
    return grad_input, grad_weight


def _expand(value: IntOrInts, dims: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dims
    values = list(value)
    return values * dims if len(values) == 1 else values


def _resolve_padding(
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
        return input, _expand(padding, dims)
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    extra = [amount % 2 for amount in total]
    if any(extra):
        pad = [side for amount in reversed(extra) for side in (0, amount)]
        input = F.pad(input, pad)
    return input, [amount // 2 for amount in total]


def _convolve(
    op: Callable[..., Tensor],
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
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            op,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            **keep.arguments(),
        )
    check_keep(op.__name__, keep, weight)
    dense_by_k = keep.select == "channel" and keep.k >= _channels_to_select_from(weight, groups)
    if dense_by_k or not needs_backward(input, weight, bias):
        return dense(input, weight, bias, stride, padding, dilation, groups)
    input, weight, bias = autocast(input, weight, bias)
    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
    dilations = _expand(dilation, dims)
    input, paddings = _resolve_padding(input, weight, padding, dilations)
    geometry = _Geometry(_expand(stride, dims), paddings, dilations, groups)
    output: Tensor = _SparseConv.apply(input, weight, bias, geometry, keep)
    return output.squeeze(0) if unbatched else output


def _channels_to_select_from(weight: Tensor, groups: int) -> int:
    out_channels = weight.shape[0]
    return out_channels if groups == out_channels else out_channels // groups


@public
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    k: int,
    select: Select = "channel",
    score: str = "l1",
    bias_grad: BiasGrad = "full",
) -> Tensor:
    """`torch.nn.functional.conv1d` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.conv1d(x, weight, bias, padding=1, k=3)    # 3 of weight.shape[0] output channels

    input [N, C_in, L] or [C_in, L], weight [C_out, C_in/groups, kL]; dtypes, `select`,
    `score`, `bias_grad`, errors and sources as in `conv2d`.
    """
    keep = Keep(k, select, score, bias_grad)
    return _convolve(conv1d, F.conv1d, 1, input, weight, bias, stride, padding, dilation, groups, keep)


@public
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    k: int,
    select: Select = "channel",
    score: str = "l1",
    bias_grad: BiasGrad = "full",
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

    The output is bit-equal to the dense operator's. Raises OpError for arguments it cannot take and on
    double backward. Source: Wei et al., 1709.05804 ("element"); meProp's unified form, 1706.06197,
    section 3.3, applied to output channels ("channel").
    """
    keep = Keep(k, select, score, bias_grad)
    return _convolve(conv2d, F.conv2d, 2, input, weight, bias, stride, padding, dilation, groups, keep)


@public
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    k: int,
    select: Select = "channel",
    score: str = "l1",
    bias_grad: BiasGrad = "full",
) -> Tensor:
    """`torch.nn.functional.conv3d` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.conv3d(x, weight, bias, padding=1, k=3)    # 3 of weight.shape[0] output channels

    input [N, C_in, D, H, W] or [C_in, D, H, W], weight [C_out, C_in/groups, kD, kH, kW]; dtypes, `select`,
    `score`, `bias_grad`, errors and sources as in `conv2d`.
    """
    keep = Keep(k, select, score, bias_grad)
    return _convolve(conv3d, F.conv3d, 3, input, weight, bias, stride, padding, dilation, groups, keep)
