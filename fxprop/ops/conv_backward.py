"""The sparse backward of convolutions: select, then run the ordinary kernels on what is left.

Layouts: input [N, C_in, *spatial], weight [C_out, C_in/groups, *kernel], grad_output
[N, C_out, *spatial_out].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprop.ops import pointwise
from fxprop.ops.common import Keep, refuse_double_backward
from fxprop.ops.select import mask_elements, select_channels


class Geometry(NamedTuple):
    """How a convolution moves over its input: one entry per spatial dimension, and the groups."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class SparseConv(torch.autograd.Function):
    """Convolution with a sparse backward; called with a batched input and numeric padding."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, keep: Keep
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
    geometry: Geometry,
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
    geometry: Geometry,
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
