"""The sparse backward of convolutions: select, then run the ordinary kernels on what is left.

Layouts: input [N, C_in, *spatial], weight [C_out, C_in/groups, *kernel], grad_output
[N, C_out, *spatial_out]. The weight of a transposed convolution is [C_in, C_out/groups, *kernel].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprop.ops import few_channels, pointwise
from fxprop.ops.chain import hand_over
from fxprop.ops.common import SparseFunction, autocast_device, of_all_rows, refuse_double_backward
from fxprop.ops.select import Keep, mask_elements, select_channels, take_channels


class Geometry(NamedTuple):
    """How a convolution moves over its input: one entry per spatial dimension, and the groups."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    transposed: bool = False
    # of a transposed convolution; zeros otherwise
    output_padding: list[int] | None = None

    def arguments(self, groups: int) -> tuple[Any, ...]:
        """As aten's convolution takes them, from stride to groups."""
        output_padding = self.output_padding or [0] * len(self.stride)
        return (self.stride, self.padding, self.dilation, self.transposed, output_padding, groups)

    def out_channels(self, weight: Tensor) -> int:
        """C_out of a convolution with this weight."""
        return weight.shape[1] * self.groups if self.transposed else weight.shape[0]


class SparseConv(SparseFunction):
    """Convolution with a sparse backward; called with a batched input and numeric padding."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        keep: Keep,
        upstream: Any | None = None,
    ) -> Tensor:
        return torch.convolution(input, weight, bias, *geometry.arguments(geometry.groups))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.geometry, ctx.keep, ctx.upstream = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            grads = _backward(ctx, grad_output, input, weight)
        return (*refuse_double_backward(grads, (grad_output, input, weight)), None, None, None)


def _backward(
    ctx: Any, grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    geometry, keep = ctx.geometry, ctx.keep
    summed = (0, *range(2, grad_output.dim()))
    grad_bias = None
    if needs_bias and keep.bias_grad == "full":
        grad_bias = grad_output.sum(summed)
        needs_bias = False
    if not (needs_input or needs_weight or needs_bias):
        return None, None, grad_bias

    wanted = (needs_input, needs_weight)
    if keep.select == "element":
        flat = mask_elements(grad_output.flatten(1), keep)
        grad = flat.view(grad_output.shape)
        grad_input, grad_weight = _dense(grad, input, weight, geometry, geometry.groups, wanted)
        return grad_input, grad_weight, grad.sum(summed) if needs_bias else grad_bias

    out_channels, groups = geometry.out_channels(weight), geometry.groups
    kept = select_channels(grad_output, 1, 1 if groups == out_channels else groups, keep)
    grad = take_channels(grad_output, kept)
    grad_input, grad_weight = from_kept(grad, kept, input, weight, geometry, keep, wanted, ctx.upstream)
    if needs_bias:
        grad_bias = grad.new_zeros(out_channels).index_copy_(0, kept, grad.sum(summed))
    return grad_input, grad_weight, grad_bias


def from_kept(
    grad: Tensor,
    kept: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    keep: Keep,
    wanted: tuple[bool, bool],
    upstream: Any | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input and grad_weight from grad_output's channels `kept`, [N, k * groups, *spatial_out].

    With `upstream`, the node of a region, grad_input is a placeholder: see `fxprop.ops.chain`.
    """
    groups = geometry.groups
    if groups > 1 and groups == geometry.out_channels(weight):
        return _depthwise(grad, input, weight, geometry, kept, keep, wanted)
    if geometry.transposed:
        return _transposed(grad, input, weight, geometry, kept, wanted)
    kept_weight = weight.index_select(0, kept)
    if upstream is not None and wanted[0] and groups == 1:
        placeholder = hand_over(
            upstream,
            grad,
            kept_weight,
            input,
            lambda grad, weight, input: _gradients(grad, weight, input, geometry, (True, False))[0],
        )
        _, grad_weight = _gradients(grad, kept_weight, input, geometry, (False, wanted[1]))
        grad_input: Tensor | None = placeholder
    else:
        grad_input, grad_weight = _gradients(grad, kept_weight, input, geometry, wanted)
    if grad_weight is not None:
        grad_weight = of_all_rows(grad_weight, kept, weight, keep)
    return grad_input, grad_weight


def _gradients(
    grad: Tensor, weight: Tensor, input: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    if pointwise.applies(input, weight, geometry.padding, geometry.groups):
        return pointwise.gradients(grad, input, weight, geometry.stride, *wanted)
    if few_channels.applies(grad, input, weight, geometry.stride, geometry.groups):
        return few_channels.gradients(grad, input, weight, geometry.padding, geometry.dilation, *wanted)
    return _dense(grad, input, weight, geometry, geometry.groups, wanted)


def _depthwise(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    kept: Tensor,
    keep: Keep,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """One output channel per group: a dropped channel drops its group, whose input is not read either."""
    per_group = input.shape[1] // geometry.groups
    kept_in = kept
    if per_group > 1:
        within = torch.arange(per_group, device=kept.device)
        kept_in = (kept[:, None] * per_group + within).flatten()
    rows = kept_in if geometry.transposed else kept
    grad_input, grad_weight = _dense(
        grad, take_channels(input, kept_in), weight.index_select(0, rows), geometry, len(kept), wanted
    )
    if grad_input is not None:
        grad_input = torch.zeros_like(input).index_copy_(1, kept_in, grad_input)
    if grad_weight is not None:
        grad_weight = of_all_rows(grad_weight, rows, weight, keep)
    return grad_input, grad_weight


def _transposed(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    kept: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Weight [C_in, C_out/groups, *kernel]: every group keeps its own columns."""
    groups = geometry.groups
    # [groups, C_in/groups, C_out/groups, *kernel]
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    columns = (kept.view(groups, -1) % weight.shape[1])[:, None, :]
    columns = columns.reshape(*columns.shape, *(1 for _ in weight.shape[2:]))
    columns = columns.expand(-1, grouped.shape[1], -1, *weight.shape[2:])
    taken = grouped.gather(2, columns)
    grad_input, grad_weight = _dense(grad, input, taken.flatten(0, 1), geometry, groups, wanted)
    if grad_weight is not None:
        kept_grad = grad_weight.reshape(taken.shape)
        spread = torch.zeros_like(grouped).scatter_(2, columns, kept_grad)
        grad_weight = spread.flatten(0, 1)
    return grad_input, grad_weight


def _dense(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    groups: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input and grad_weight by the ordinary kernel."""
    if not any(wanted):
        return None, None
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, *geometry.arguments(groups), [*wanted, False]
    )
    return grad_input, grad_weight
