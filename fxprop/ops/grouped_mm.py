"""The sparse grouped product: `torch.nn.functional.grouped_mm`, a mixture of experts' linear layers.

Layouts: mat_a [rows, in_features] with the rows of one expert together, mat_b [experts, in_features,
out_features], offs [experts] the end of each expert's rows.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprop.errors import OpError
from fxprop.ops.calling import check_keep, is_dense, sparse
from fxprop.ops.engine import run
from fxprop.ops.form import Form, Operands, Pair
from fxprop.ops.keep import Keep
from fxprop.ops.scores import RANDOM, channel_scores, l2_norms, sum_over_processes
from fxprop.settings import KeepArgs

# keywords of other operators
WITHOUT = ("bias_grad", "norm_grad", "weight_grad", "chained")

# the kernels want rows that start at multiples of 16 bytes
_ALIGNMENT = 16


class GroupedMM(Form):
    """A call of the operator; the other operand are the offsets."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        return F.grouped_mm(input, weight, offs=others[0])

    def arrange(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output.contiguous()

    def scores(self, grad: Tensor, keep: Keep, of: Operands) -> Tensor:
        (offs,) = of.others
        return _scores(grad, _expert_of_rows(grad, offs), offs, keep)

    def weight_norms(self, weight: Tensor) -> Tensor:
        return l2_norms(weight, (1,))  # [experts, features]

    def weighted(self, scores: Tensor, keep: Keep, of: Operands) -> Tensor:
        # which are sums of squares here
        return scores * self.weight_norms(of.weight).square()

    def top(self, scores: Tensor, k: int) -> Tensor:
        return scores.topk(k, dim=1).indices  # [experts, k]

    def take(self, grad: Tensor, kept: Tensor, of: Operands) -> Tensor:
        expert = _expert_of_rows(grad, of.others[0]).clamp(max=len(kept) - 1)
        return _pad(grad.gather(1, kept[expert]))

    def from_kept(self, grad: Tensor, kept: Tensor, of: Operands, keep: Keep) -> Pair:
        index = kept[:, None, :].expand(-1, of.weight.shape[1], -1)
        of_kept = _pad(of.weight.gather(2, index))
        grad_input, grad_weight = self.products(grad, of.input, of_kept, of)
        if grad_weight is not None:
            grad_weight = torch.zeros_like(of.weight).scatter_(2, index, grad_weight[..., : kept.shape[1]])
        return grad_input, grad_weight

    def products(self, grad: Tensor, input: Tensor, weight: Tensor, of: Operands) -> Pair:
        (offs,) = of.others
        return (
            F.grouped_mm(grad, weight.transpose(1, 2), offs=offs) if of.needed[0] else None,
            # [experts, in_features, features]
            F.grouped_mm(input.t(), grad, offs=offs) if of.needed[1] else None,
        )

    def others_of_rows(self, kept: Tensor, of: Operands) -> tuple[Tensor, ...]:
        (offs,) = of.others
        return (torch.searchsorted(kept, offs.to(kept.dtype)).to(offs.dtype),)


def _expert_of_rows(grad: Tensor, offs: Tensor) -> Tensor:
    """The expert of each row; as many as there are for those past the last offset."""
    rows = torch.arange(len(grad), device=grad.device, dtype=offs.dtype)
    return torch.searchsorted(offs, rows, right=True)


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
    return sum_over_processes(scores) if keep.sync_selection else scores


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
    keep = Keep.given("grouped_mm", settings, WITHOUT)
    check_keep("grouped_mm", keep, mat_b)
    if mat_a.dim() != 2 or mat_b.dim() != 3:
        raise OpError(
            f"grouped_mm of {list(mat_a.shape)} and {list(mat_b.shape)}: expected [rows, in_features] "
            "and [experts, in_features, out_features]; use the dense operator"
        )
    if is_dense(keep, mat_b.shape[2], mat_b.shape[2], mat_a, mat_b):
        return F.grouped_mm(mat_a, mat_b, offs=offs)
    return run(GroupedMM(), keep, mat_a, mat_b, None, offs)
