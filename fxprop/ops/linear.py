"""The sparse linear operator: `torch.nn.functional.linear` with meProp's backward.

Layouts: input [*, in_features], weight [out_features, in_features], grad_output [*, out_features].
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprop.ops.calling import autocast, check_keep, is_dense, sparse
from fxprop.ops.engine import run
from fxprop.ops.entries.calls import Call, Tensors
from fxprop.ops.form import Form, Operands, Pair, sums_per_channel
from fxprop.ops.function import of_all_rows
from fxprop.ops.keep import Keep
from fxprop.ops.kernels.layout import take_features, top_channels
from fxprop.ops.scores import channel_scores, l2_norms
from fxprop.settings import KeepArgs

# keywords of other operators
WITHOUT = ("norm_grad", "chained")


def dense_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by the kernels it picks when autograd records it.

    aten's matmul folds a non-contiguous input to 2-d only if the transposed weight requires grad, which
    it does not inside an autograd function; bit-equality needs the same fold here.
    """
    if input.dim() == 2:
        return F.linear(input, weight, bias)
    if input.dim() < 2 or input.is_contiguous() or not weight.requires_grad:
        output = F.linear(input, weight, bias)
    else:
        output = input.reshape(-1, input.shape[-1]).mm(weight.t())
        if bias is not None:
            output.add_(bias)
    # an autograd function must not return a view: in-place activations would be refused. aten's own
    # matmul ends in the same operator.
    shape = (*input.shape[:-1], weight.shape[0])
    result: Tensor = torch.ops.aten._unsafe_view(output, shape)
    return result


class Linear(Form):
    """A call of the operator."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        return dense_forward(input, weight, bias)

    def arrange(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output.reshape(-1, weight.shape[0])  # [rows, out_features]

    def arrange_input(self, input: Tensor) -> Tensor:
        return input.reshape(-1, input.shape[-1])

    def restore(self, grads: Pair, of: Operands) -> Pair:
        return None if grads[0] is None else grads[0].view(of.input.shape), grads[1]

    def scores(self, grad: Tensor, keep: Keep, of: Operands) -> Tensor:
        return channel_scores(grad, (0,), keep)

    def weight_norms(self, weight: Tensor) -> Tensor:
        return l2_norms(weight, (1,))

    def top(self, scores: Tensor, k: int) -> Tensor:
        return top_channels(scores, 1, k)

    def take(self, grad: Tensor, kept: Tensor, of: Operands) -> Tensor:
        return take_features(grad, kept)

    def from_kept(self, grad: Tensor, kept: Tensor, of: Operands, keep: Keep) -> Pair:
        of_kept = of.weight.index_select(0, kept)
        grad_input, grad_weight = self.restore(
            self.products(grad, self.arrange_input(of.input), of_kept, of), of
        )
        if grad_weight is not None:
            grad_weight = of_all_rows(grad_weight, kept, of.weight, keep)
        return grad_input, grad_weight

    def products(self, grad: Tensor, input: Tensor, weight: Tensor, of: Operands) -> Pair:
        return grad.mm(weight) if of.needed[0] else None, grad.t().mm(input) if of.needed[1] else None

    def as_call(self, grad: Tensor, of: Operands) -> tuple[Call, Tensors] | None:
        return Call([], [], []), Tensors(grad, self.arrange_input(of.input), of.weight)

    def of_call(self, grads: Pair, of: Operands) -> Pair:
        return self.restore(grads, of)

    def bias(self, grad: Tensor, kept: Tensor | None, weight: Tensor, shape: torch.Size) -> Tensor:
        return sums_per_channel(grad, (0,), kept, shape)


@sparse
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.nn.functional.linear` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.linear(x, weight, bias, k=25)        # 25 of weight.shape[0] output features
    >>> y = fxprop.ops.linear(x, weight, k=25, select="element")

    Args:
        input: [*, in_features], any rank from 1; float64/32, bfloat16 or float16. Also nested, with the
            jagged layout.
        weight: [out_features, in_features].
        bias: [out_features] or None.
        k: how many to keep; k >= out_features is the dense operator.
        k_input, k_weight: how many for the input's gradient and for the weight's, where that is not k; with
            0 there is none. The bias's goes by bias_grad, and "selected" is the weight's.
        select: "channel" keeps the same k output features for the whole batch; "element" the top-k of
            each row of grad_output.
        score: "l1", "l2", "random" or a registered name.
        score_weight: with "channel" and "l2", rank for the input's gradient by the norms times those of the
            features' weights.
        bias_grad: "full" sums all of grad_output, "selected" only what was kept.
        weight_grad: "dense", or "row_sparse": with "channel", the weight's gradient is a sparse tensor with
            the kept rows, as `nn.Embedding(sparse=True)` has it. The weight must be a parameter itself.

    The output is bit-equal to the dense operator's. Raises OpError for arguments it cannot take and on
    double backward. Source: meProp, 1706.06197, equations 5 to 8; "unified" form, section 3.3.
    """
    keep = Keep.given("linear", settings, WITHOUT)
    check_keep("linear", keep, weight)
    # the rows of a nested tensor lie one after the other; which of its sizes is ragged has no public name
    if getattr(input, "_ragged_idx", None) == 1:
        nested: Any = input
        values = linear(nested.values(), weight, bias, **keep.arguments(WITHOUT))
        return torch.nested.nested_tensor_from_jagged(values, nested.offsets(), nested.lengths())
    if is_dense(keep, weight.shape[0], weight.shape[0], input, weight, bias):
        return F.linear(input, weight, bias)
    return run(Linear(), keep, *autocast(input, weight, bias, keep.weight_grad))
