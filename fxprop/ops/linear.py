"""The sparse linear operator: `torch.nn.functional.linear` with meProp's backward.

Layouts: input [*, in_features], weight [out_features, in_features], grad_output [*, out_features].
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprop.ops.common import (
    SparseFunction,
    autocast,
    autocast_device,
    check_keep,
    needs_backward,
    of_all_rows,
    refuse_double_backward,
    sparse,
)
from fxprop.ops.select import Keep, mask_elements, select_channels, take_features
from fxprop.settings import KeepArgs


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


class _SparseLinear(SparseFunction):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, keep: Keep) -> Tensor:
        return dense_forward(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.keep = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            grads = _backward(grad_output, input, weight, ctx.keep, ctx.needs_input_grad)
        return (*refuse_double_backward(grads, (grad_output, input, weight)), None)


def _backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, keep: Keep, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_input, needs_weight, needs_bias = needs[:3]
    grad = grad_output.reshape(-1, weight.shape[0])  # [rows, out_features]
    grad_bias = None
    if needs_bias and keep.bias_grad == "full":
        grad_bias = grad.sum(0)
        needs_bias = False
    if not (needs_input or needs_weight or needs_bias):
        return None, None, grad_bias

    wanted = (needs_input, needs_weight)
    if keep.select == "element":
        grad = mask_elements(grad, keep)
        return *_products(grad, input, weight, wanted), grad.sum(0) if needs_bias else grad_bias
    kept = select_channels(grad, 1, 1, keep)
    grad = take_features(grad, kept)
    if needs_bias:
        grad_bias = grad.new_zeros(weight.shape[0]).index_copy_(0, kept, grad.sum(0))
    return *from_kept(grad, kept, input, weight, keep, wanted), grad_bias


def from_kept(
    grad: Tensor, kept: Tensor, input: Tensor, weight: Tensor, keep: Keep, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input and grad_weight from grad_output's features `kept`, [rows, k]."""
    grad_input, grad_weight = _products(grad, input, weight.index_select(0, kept), wanted)
    if grad_weight is not None:
        grad_weight = of_all_rows(grad_weight, kept, weight, keep)
    return grad_input, grad_weight


def _products(
    grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    needs_input, needs_weight = wanted
    return (
        grad.mm(weight).view(input.shape) if needs_input else None,
        grad.t().mm(input.reshape(-1, input.shape[-1])) if needs_weight else None,
    )


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
        select: "channel" keeps the same k output features for the whole batch; "element" the top-k of
            each row of grad_output.
        score: "l1", "l2", "random" or a registered name.
        bias_grad: "full" sums all of grad_output, "selected" only what was kept.
        weight_grad: "dense", or "row_sparse": with "channel", the weight's gradient is a sparse tensor with
            the kept rows, as `nn.Embedding(sparse=True)` has it. The weight must be a parameter itself.

    The output is bit-equal to the dense operator's. Raises OpError for arguments it cannot take and on
    double backward. Source: meProp, 1706.06197, equations 5 to 8; "unified" form, section 3.3.
    """
    keep = Keep.given("linear", settings, ("norm_grad", "chained"))
    check_keep("linear", keep, weight)
    # the rows of a nested tensor lie one after the other; which of its sizes is ragged has no public name
    if getattr(input, "_ragged_idx", None) == 1:
        nested: Any = input
        values = linear(nested.values(), weight, bias, **keep.arguments())
        return torch.nested.nested_tensor_from_jagged(values, nested.offsets(), nested.lengths())
    if keep.k >= weight.shape[0] or not needs_backward(input, weight, bias):
        return F.linear(input, weight, bias)
    input, weight, bias = autocast(input, weight, bias, keep.weight_grad)
    output: Tensor = _SparseLinear.apply(input, weight, bias, keep)
    return output
