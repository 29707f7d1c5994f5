"""Kept channels of a tensor, in its memory format."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprop.ops.compiling import is_compiling


def top_channels(scores: Tensor, groups: int, k: int) -> Tensor:
    """Indices of the k highest scores in each of `groups` equal runs, int64 [k * groups]."""
    if groups == 1:
        return scores.topk(k).indices
    per_group = scores.numel() // groups
    kept = scores.view(groups, per_group).topk(k, dim=1).indices
    offsets = torch.arange(0, scores.numel(), per_group, device=kept.device)
    return (kept + offsets[:, None]).flatten()


def take_features(rows: Tensor, kept: Tensor) -> Tensor:
    """The kept columns of [rows, features]."""
    if rows.device.type != "cpu":
        return rows.index_select(1, kept)
    # 1.5 to 2 times as fast as index_select on the CPU
    return rows.gather(1, kept.expand(len(rows), -1))


def is_channels_last(tensor: Tensor) -> bool:
    """Whether [N, C, *spatial] lies in memory as [N, *spatial, C].

    False under torch.compile, which chooses layouts itself. There a backward that asks for strides is
    traced twice, the second time with contiguous gradients, and the first trace never leaves the autocast
    mode that it entered: whatever follows would be traced without autocast.
    """
    return not is_compiling() and lies_channels_last(tensor)


def lies_channels_last(tensor: Tensor) -> bool:
    """The same of a tensor that is there, whatever is being traced."""
    return tensor.dim() > 2 and not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def take_channels(grad_output: Tensor, kept: Tensor) -> Tensor:
    """The kept channels of [N, C, *spatial], in its memory format.

    index_select would gather across strides, and give a contiguous tensor: 23 ms in place of 0.6 for 26 of
    256 channels of 8 x 56 x 56.
    """
    if not is_channels_last(grad_output):
        return grad_output.index_select(1, kept)
    rows = grad_output.movedim(1, -1)
    taken = take_features(rows.reshape(-1, rows.shape[-1]), kept)
    return taken.view(*rows.shape[:-1], len(kept)).movedim(-1, 1)
