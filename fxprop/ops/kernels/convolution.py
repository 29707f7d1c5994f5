"""A convolution, transposed or not, to its sparse backward: the ordinary kernels on what is left.

Layouts: input [N, C_in, *spatial], weight [C_out, C_in/groups, *kernel], grad_output
[N, C_out, *spatial_out]. The weight of a transposed convolution is [C_in, C_out/groups, *kernel].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprop.ops.axes import channel_runs
from fxprop.ops.form import Needed, Others, Pair, sums_per_channel
from fxprop.ops.function import of_all_rows
from fxprop.ops.keep import Keep
from fxprop.ops.kernels import conv_1x1, few_channels
from fxprop.ops.kernels.handover import hand_over
from fxprop.ops.kernels.layout import take_channels, top_channels
from fxprop.ops.scores import channel_scores


class Convolution(NamedTuple):
    """A call of a convolution with a batched input; one number per spatial dimension. See `Form`."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    transposed: bool = False
    # of a transposed convolution; zeros otherwise
    output_padding: list[int] | None = None
    # the node of the region that the input comes from, if it computes less for it: see `handover`
    upstream: Any | None = None

    def arguments(self, groups: int) -> tuple[Any, ...]:
        """As aten's convolution takes them, from stride to groups."""
        output_padding = self.output_padding or [0] * len(self.stride)
        return (self.stride, self.padding, self.dilation, self.transposed, output_padding, groups)

    def features(self, weight: Tensor) -> int:
        """Output channels of a group."""
        return weight.shape[1] if self.transposed else weight.shape[0] // self.groups

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, others: Others) -> Tensor:
        return torch.convolution(input, weight, bias, *self.arguments(self.groups))

    def arrange(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output

    def arrange_input(self, input: Tensor) -> Tensor:
        return input

    def restore(self, grads: Pair, input: Tensor, weight: Tensor) -> Pair:
        return grads

    @property
    def rows_dim(self) -> int:
        return 0

    def examples(self, grad: Tensor) -> Tensor:
        return grad.flatten(1)

    def scores(self, grad: Tensor, keep: Keep, others: Others) -> Tensor:
        return channel_scores(grad, (0, *range(2, grad.dim())), keep)

    def top(self, scores: Tensor, keep: Keep) -> Tensor:
        """As in `Form`: int64 [k * groups], group after group."""
        runs, _ = channel_runs(self.groups, len(scores) // self.groups)
        return top_channels(scores, runs, int(keep.k))

    def take(self, grad: Tensor, kept: Tensor, others: Others) -> Tensor:
        return take_channels(grad, kept)

    def from_kept(
        self,
        grad: Tensor,
        kept: Tensor,
        input: Tensor,
        weight: Tensor,
        others: Others,
        keep: Keep,
        wanted: Needed,
    ) -> Pair:
        """As in `Form`; with `upstream`, grad_input is a placeholder."""
        if self.groups > 1 and self.features(weight) == 1:
            return _depthwise(self, grad, input, weight, kept, keep, wanted)
        if self.transposed:
            return _transposed(self, grad, input, weight, kept, wanted)
        of_kept = weight.index_select(0, kept)
        if self.upstream is not None and wanted[0] and self.groups == 1:
            grad_input: Tensor | None = hand_over(
                self.upstream,
                grad,
                of_kept,
                input,
                lambda grad, weight, input: self.of_few(grad, input, weight, (True, False))[0],
            )
            _, grad_weight = self.of_few(grad, input, of_kept, (False, wanted[1]))
        else:
            grad_input, grad_weight = self.of_few(grad, input, of_kept, wanted)
        if grad_weight is not None:
            grad_weight = of_all_rows(grad_weight, kept, weight, keep)
        return grad_input, grad_weight

    def of_few(self, grad: Tensor, input: Tensor, weight: Tensor, wanted: Needed) -> Pair:
        """As `products`, by what is fastest for few output channels."""
        if conv_1x1.applies(input, weight, self.padding, self.groups):
            return conv_1x1.gradients(grad, input, weight, self.stride, *wanted)
        if few_channels.applies(grad, input, weight, self.stride, self.groups):
            return few_channels.gradients(grad, input, weight, self.padding, self.dilation, *wanted)
        return self.products(grad, input, weight, (), wanted)

    def products(
        self,
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        others: Others,
        wanted: Needed,
    ) -> Pair:
        return _dense(self, grad, input, weight, self.groups, wanted)

    def of_rows(self, others: Others, kept: Tensor) -> Others:
        return others

    def bias(self, grad: Tensor, kept: Tensor | None, weight: Tensor, shape: torch.Size) -> Tensor:
        return sums_per_channel(grad, (0, *range(2, grad.dim())), kept, shape)


def _depthwise(
    form: Convolution,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    kept: Tensor,
    keep: Keep,
    wanted: Needed,
) -> Pair:
    """One output channel per group: a dropped channel drops its group, whose input is not read either."""
    per_group = input.shape[1] // form.groups
    kept_in = kept
    if per_group > 1:
        within = torch.arange(per_group, device=kept.device)
        kept_in = (kept[:, None] * per_group + within).flatten()
    rows = kept_in if form.transposed else kept
    grad_input, grad_weight = _dense(
        form, grad, take_channels(input, kept_in), weight.index_select(0, rows), len(kept), wanted
    )
    if grad_input is not None:
        grad_input = torch.zeros_like(input).index_copy_(1, kept_in, grad_input)
    if grad_weight is not None:
        grad_weight = of_all_rows(grad_weight, rows, weight, keep)
    return grad_input, grad_weight


def _transposed(
    form: Convolution,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    kept: Tensor,
    wanted: Needed,
) -> Pair:
    """Weight [C_in, C_out/groups, *kernel]: every group keeps its own columns."""
    groups = form.groups
    # [groups, C_in/groups, C_out/groups, *kernel]
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    columns = (kept.view(groups, -1) % weight.shape[1])[:, None, :]
    columns = columns.reshape(*columns.shape, *(1 for _ in weight.shape[2:]))
    columns = columns.expand(-1, grouped.shape[1], -1, *weight.shape[2:])
    taken = grouped.gather(2, columns)
    grad_input, grad_weight = _dense(form, grad, input, taken.flatten(0, 1), groups, wanted)
    if grad_weight is not None:
        kept_grad = grad_weight.reshape(taken.shape)
        spread = torch.zeros_like(grouped).scatter_(2, columns, kept_grad)
        grad_weight = spread.flatten(0, 1)
    return grad_input, grad_weight


def _dense(
    form: Convolution, grad: Tensor, input: Tensor, weight: Tensor, groups: int, wanted: Needed
) -> Pair:
    if not any(wanted):
        return None, None
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, *form.arguments(groups), [*wanted, False]
    )
    return grad_input, grad_weight
