"""The sparse grouped product: `torch.nn.functional.grouped_mm`, a mixture of experts' linear layers.

Layouts: mat_a [rows, in_features] with the rows of one expert together, mat_b [experts, in_features,
out_features], offs [experts] the end of each expert's rows.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprop.errors import OpError
from fxprop.ops.common import (
    SparseFunction,
    check_keep,
    needs_backward,
    refuse_double_backward,
    sparse,
)
from fxprop.ops.select import RANDOM, Keep, channel_scores, mask_elements, summed_over_processes
from fxprop.settings import KeepArgs

# the kernels want rows that start at multiples of 16 bytes
_ALIGNMENT = 16


class _SparseGroupedMM(SparseFunction):
    @staticmethod
    def forward(mat_a: Tensor, mat_b: Tensor, offs: Tensor, keep: Keep) -> Tensor:
        return F.grouped_mm(mat_a, mat_b, offs=offs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        mat_a, mat_b, offs, ctx.keep = inputs
        ctx.save_for_backward(mat_a, mat_b, offs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        mat_a, mat_b, offs = ctx.saved_tensors
        with torch.no_grad():
            grads = _backward(grad_output, mat_a, mat_b, offs, ctx.keep, ctx.needs_input_grad)
        return (*refuse_double_backward(grads, (grad_output, mat_a, mat_b)), None, None)


def _backward(
    grad_output: Tensor, mat_a: Tensor, mat_b: Tensor, offs: Tensor, keep: Keep, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    grad = grad_output.contiguous()
    experts = len(mat_b)
    rows = torch.arange(len(grad), device=grad.device, dtype=offs.dtype)
    expert = torch.searchsorted(offs, rows, right=True)  # of each row; `experts` past the last offset
    index = None
    kept_weight = mat_b
    if keep.select == "element":
        grad = mask_elements(grad, keep)
    else:
        scores = _scores(grad, expert, offs, keep)
        kept = scores.topk(keep.k, dim=1).indices  # [experts, k]
        grad = _pad(grad.gather(1, kept[expert.clamp(max=experts - 1)]))
        index = kept[:, None, :].expand(-1, mat_b.shape[1], -1)
        kept_weight = _pad(mat_b.gather(2, index))
    grad_a = grad_b = None
    if needs[0]:
        grad_a = F.grouped_mm(grad, kept_weight.transpose(1, 2), offs=offs)
    if needs[1]:
        grad_b = F.grouped_mm(mat_a.t(), grad, offs=offs)  # [experts, in_features, k]
        if index is not None:
            grad_b = torch.zeros_like(mat_b).scatter_(2, index, grad_b[..., : keep.k])
    return grad_a, grad_b


def _scores(grad: Tensor, expert: Tensor, offs: Tensor, keep: Keep) -> Tensor:
    """[experts, out_features]: each expert's scores over the first of its own rows."""
    experts, features = len(offs), grad.shape[1]
    if keep.score == RANDOM:
        scores = torch.rand(experts, features, device=grad.device)
    elif keep.score in ("l1", "l2"):
        if keep.score_fraction < 1:
            rows, expert = _first_rows(offs, len(grad), keep.score_fraction)
            grad = grad[rows]
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        powers = grad.square() if keep.score == "l2" else grad.abs()
        # one more for rows that belong to no expert. The root of l2 would not change the order
        scores = powers.new_zeros(experts + 1, features).index_add_(0, expert, powers)[:experts]
    else:
        parts = grad.tensor_split(offs.to("cpu", torch.int64))[:experts]
        alone = keep._replace(sync_selection=False)
        scores = torch.stack(
            [channel_scores(part, (0,), alone) if len(part) else grad.new_zeros(features) for part in parts]
        )
    return summed_over_processes(scores) if keep.sync_selection else scores


def _first_rows(offs: Tensor, rows: int, fraction: float) -> tuple[Tensor, Tensor]:
    """The first `fraction` of each expert's rows, rounded up, and the expert of each.

    As many as there can be at most, lest the host wait for the device; those too many belong to none.
    """
    experts = len(offs)
    starts = F.pad(offs, (1, -1)).long()
    counts = (fraction * (offs - starts).double()).ceil().long()
    ends = counts.cumsum(0)
    places = torch.arange(min(rows, math.floor(fraction * rows) + experts), device=offs.device)
    expert = torch.searchsorted(ends, places, right=True)
    shift = F.pad(starts - (ends - counts), (0, 1))
    return places + shift[expert], expert


def _pad(tensor: Tensor) -> Tensor:
    """`tensor` with its last dimension filled up with zeros to the alignment."""
    width = _ALIGNMENT // tensor.element_size()
    return F.pad(tensor, (0, -tensor.shape[-1] % width))


@sparse
def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.nn.functional.grouped_mm` whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.grouped_mm(x, w, offs=offs, k=25)     # 25 of each expert's w.shape[2] features

    Args:
        mat_a: [rows, in_features], the rows of one expert together.
        mat_b: [experts, in_features, out_features], the weight.
        offs: int32 [experts], the end of each expert's rows.
        k, select: "channel" keeps k output features of each expert, scored over its own rows.
        score: "l1", "l2", "random" or a registered name. The latter is called for one expert after the
            other, and the host waits for `offs`.
        score_fraction: scores from this share of each expert's rows, from their beginning.

    The output is bit-equal to the dense operator's. Raises OpError for arguments it cannot take and on
    double backward.
    """
    keep = Keep.given("grouped_mm", settings, ("bias_grad", "norm_grad", "weight_grad", "chained"))
    check_keep("grouped_mm", keep, mat_b)
    if mat_a.dim() != 2 or mat_b.dim() != 3:
        raise OpError(
            f"grouped_mm of {list(mat_a.shape)} and {list(mat_b.shape)}: expected [rows, in_features] "
            "and [experts, in_features, out_features]; use the dense operator"
        )
    if keep.k >= mat_b.shape[2] or not needs_backward(mat_a, mat_b):
        return F.grouped_mm(mat_a, mat_b, offs=offs)
    output: Tensor = _SparseGroupedMM.apply(mat_a, mat_b, offs, keep)
    return output
