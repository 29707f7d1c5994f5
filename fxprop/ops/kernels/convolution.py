"""A convolution, transposed or not, to its sparse backward: the ordinary kernels on what is left.

Layouts: input [N, C_in, *spatial], weight [C_out, C_in/groups, *kernel], grad_output
[N, C_out, *spatial_out]. The weight of a transposed convolution is [C_in, C_out/groups, *kernel].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprop.ops.axes import channel_runs
from fxprop.ops.entries.calls import Call, Tensors
from fxprop.ops.form import Form, Operands, Pair, sums_per_channel
from fxprop.ops.function import of_all_rows
from fxprop.ops.keep import Keep
from fxprop.ops.kernels import conv_1x1, few_channels
from fxprop.ops.kernels.handover import hand_over
from fxprop.ops.kernels.layout import take_channels, top_channels
from fxprop.ops.scores import channel_scores, l2_norms


@dataclass(frozen=True)
class Convolution(Form):
    """A call of a convolution with a batched input; one number per spatial dimension."""

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

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        return torch.convolution(input, weight, bias, *self.arguments(self.groups))

    def examples(self, grad: Tensor) -> Tensor:
        return grad.flatten(1)

    def scores(self, grad: Tensor, keep: Keep, of: Operands) -> Tensor:
        return channel_scores(grad, (0, *range(2, grad.dim())), keep)

    def choices(self, grad: Tensor) -> int:
        return channel_runs(self.groups, grad.shape[1] // self.groups)[1]

    def weight_norms(self, weight: Tensor) -> Tensor:
        if not self.transposed:
            return l2_norms(weight.flatten(1), (1,))
        # [groups, C_in/groups, C_out/groups, kernel]
        grouped = weight.reshape(self.groups, -1, weight.shape[1], weight[0, 0].numel())
        return l2_norms(grouped, (1, 3)).flatten()

    def top(self, scores: Tensor, k: int) -> Tensor:
        """As in `Form`: int64 [k * groups], group after group."""
        runs, _ = channel_runs(self.groups, len(scores) // self.groups)
        return top_channels(scores, runs, k)

    def take(self, grad: Tensor, kept: Tensor, of: Operands) -> Tensor:
        return take_channels(grad, kept)

    def from_kept(self, grad: Tensor, kept: Tensor, of: Operands, keep: Keep) -> Pair:
        """As in `Form`; with `upstream`, grad_input is a placeholder."""
        if self.groups > 1 and self.features(of.weight) == 1:
            return self._depthwise(grad, kept, of, keep)
        if self.transposed:
            return self._transposed(grad, kept, of)
        of_kept = of.weight.index_select(0, kept)
        if self.upstream is not None and of.needed[0] and self.groups == 1:
            grad_input: Tensor | None = hand_over(
                self.upstream,
                grad,
                of_kept,
                of.input,
                lambda grad, weight, input: self._of_few(grad, input, weight, (True, False))[0],
            )
            _, grad_weight = self._of_few(grad, of.input, of_kept, (False, of.needed[1]))
        else:
            grad_input, grad_weight = self._of_few(grad, of.input, of_kept, of.needed)
        if grad_weight is not None:
            grad_weight = of_all_rows(grad_weight, kept, of.weight, keep)
        return grad_input, grad_weight

    def products(self, grad: Tensor, input: Tensor, weight: Tensor, of: Operands) -> Pair:
        return self._dense(grad, input, weight, self.groups, of.needed)

    def as_call(self, grad: Tensor, of: Operands) -> tuple[Call, Tensors] | None:
        call = Call(self.stride, self.padding, self.dilation, self.transposed, self.groups)
        return call, Tensors(grad, of.input, of.weight)

    def bias(self, grad: Tensor, kept: Tensor | None, weight: Tensor, shape: torch.Size) -> Tensor:
        return sums_per_channel(grad, (0, *range(2, grad.dim())), kept, shape)

    def _of_few(self, grad: Tensor, input: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> Pair:
        """By what is fastest for few output channels."""
        if not any(needed):
            return None, None
        if conv_1x1.applies(input, weight, self.padding, self.groups):
            return conv_1x1.gradients(grad, input, weight, self.stride, *needed)
        if few_channels.applies(grad, input, weight, self.stride, self.groups):
            return few_channels.gradients(grad, input, weight, self.padding, self.dilation, *needed)
        return self._dense(grad, input, weight, self.groups, needed)

    def _depthwise(self, grad: Tensor, kept: Tensor, of: Operands, keep: Keep) -> Pair:
        """A dropped channel drops its group, whose input is not read either."""
        per_group = of.input.shape[1] // self.groups
        kept_in = kept
        if per_group > 1:
            within = torch.arange(per_group, device=kept.device)
            kept_in = (kept[:, None] * per_group + within).flatten()
        rows = kept_in if self.transposed else kept
        input, weight = take_channels(of.input, kept_in), of.weight.index_select(0, rows)
        grad_input, grad_weight = self._dense(grad, input, weight, len(kept), of.needed)
        if grad_input is not None:
            grad_input = torch.zeros_like(of.input).index_copy_(1, kept_in, grad_input)
        if grad_weight is not None:
            grad_weight = of_all_rows(grad_weight, rows, of.weight, keep)
        return grad_input, grad_weight

    def _transposed(self, grad: Tensor, kept: Tensor, of: Operands) -> Pair:
        """Weight [C_in, C_out/groups, *kernel]: every group keeps its own columns."""
        weight, groups = of.weight, self.groups
        # [groups, C_in/groups, C_out/groups, *kernel]
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        columns = (kept.view(groups, -1) % weight.shape[1])[:, None, :]
        columns = columns.reshape(*columns.shape, *(1 for _ in weight.shape[2:]))
        columns = columns.expand(-1, grouped.shape[1], -1, *weight.shape[2:])
        taken = grouped.gather(2, columns)
        grad_input, grad_weight = self._dense(grad, of.input, taken.flatten(0, 1), groups, of.needed)
        if grad_weight is not None:
            kept_grad = grad_weight.reshape(taken.shape)
            spread = torch.zeros_like(grouped).scatter_(2, columns, kept_grad)
            grad_weight = spread.flatten(0, 1)
        return grad_input, grad_weight

    def _dense(
        self, grad: Tensor, input: Tensor, weight: Tensor, groups: int, needed: tuple[bool, bool]
    ) -> Pair:
        if not any(needed):
            return None, None
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, input, weight, None, *self.arguments(groups), [*needed, False]
        )
        return grad_input, grad_weight
