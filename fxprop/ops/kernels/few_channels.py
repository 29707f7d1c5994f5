"""The backward of convolutions for few output channels, as matrix products over shifted copies of them.

The convolution kernels of the CPU work in blocks of 16 channels, and take as long for 3 as for 16 (64 -> 3
channels of 8 x 56 x 56, 3 x 3: 3.5 ms, against 0.9 ms here). grad_output of few channels is small, so
that a copy of it for each position of the kernel costs little, and both gradients are products with these
copies. Same arithmetic, same FLOPs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprop.ops.kernels.layout import is_channels_last

# channels that the convolution kernels compute at once
_BLOCK = 16
# how much more work, in tenths, a block with its unused channels must be for this to be faster: on small
# images, and on others (whole numbers: torch.compile makes inputs of a graph of floats that are global)
_WASTE_SMALL, _WASTE = 20, 12
_SMALL = 100


def applies(grad_output: Tensor, input: Tensor, weight: Tensor, stride: list[int], groups: int) -> bool:
    """Whether `gradients` covers this convolution and is the faster way.

    Only where output and input are of one size: elsewhere there would be more to compute. Half types are
    left to the convolution kernels, which accumulate in float32; other devices because it was not measured.
    """
    return (
        groups == 1
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.float64)
        and all(step == 1 for step in stride)
        and grad_output.shape[2:] == input.shape[2:]
        and pays(len(weight), math.prod(input.shape[2:]))
    )


def pays(channels: int, positions: int) -> bool:
    """Whether so many channels of an image are faster by products than in blocks of the convolution's."""
    waste = _WASTE if positions >= _SMALL else _WASTE_SMALL
    return 10 * in_blocks(channels) >= channels * waste


def in_blocks(channels: int) -> int:
    """How many channels the convolution kernels compute for so many."""
    # not by math.ceil, which torch.compile does not take of a free size
    return -(-channels // _BLOCK) * _BLOCK


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding: list[int],
    dilation: list[int],
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input and grad_weight of a convolution with stride 1.

    grad_output [N, k, *spatial], input [N, C_in, *spatial], weight [k, C_in, *kernel].
    """
    kernel = weight.shape[2:]
    dims = tuple(range(2, weight.dim()))
    # a tap at one end of the kernel meets grad_output shifted to the other
    flipped = weight.flip(dims).movedim(1, -1).flatten(0, -2)  # [k * kernel, C_in]
    # not by grad_output: a single channel has no layout to tell
    in_rows = is_channels_last(input)
    shifted = _shift_copies(grad_output, input.shape[2:], kernel, padding, dilation, in_rows)
    grad_input = grad_weight = None
    if in_rows:
        # [N * spatial, k * kernel] and [N * spatial, C_in]
        rows = input.movedim(1, -1)
        if needs_input:
            grad_input = shifted.mm(flipped).view(rows.shape).movedim(-1, 1)
        if needs_weight:
            grad_weight = shifted.t().mm(rows.reshape(len(shifted), -1))
    else:
        # [N, k * kernel, spatial] and [N, C_in, spatial]
        if needs_input:
            grad_input = flipped.t().matmul(shifted).view(input.shape)
        if needs_weight:
            grad_weight = shifted.bmm(input.flatten(2).transpose(1, 2)).sum(0)
    if grad_weight is not None:
        grad_weight = grad_weight.view(len(weight), *kernel, -1).movedim(-1, 1).flip(dims)
    return grad_input, grad_weight


def _shift_copies(
    grad_output: Tensor,
    size: torch.Size,
    kernel: torch.Size,
    padding: list[int],
    dilation: list[int],
    in_rows: bool,
) -> Tensor:
    """A copy of grad_output for every position of the kernel: [N, k * kernel, spatial] or rows of it."""
    reach = [step * (taps - 1) for step, taps in zip(dilation, kernel, strict=True)]
    margins = [r - p for r, p in zip(reach, padding, strict=True)]
    padded = F.pad(grad_output, [side for margin in reversed(margins) for side in (margin, margin)])
    # [N, k, *kernel, *size], a view
    windows = padded
    behind: tuple[Any, ...] = (slice(None),) * len(size)
    for dim, (length, step) in enumerate(zip(size, dilation, strict=True), start=2):
        windows = windows.unfold(dim, length, 1)[(..., slice(None, None, step), *behind)]
    if in_rows:
        taps = range(1, 2 + len(size))
        windows = windows.permute(0, *range(2 + len(size), windows.dim()), *taps)
        return windows.reshape(len(padded) * math.prod(size), -1)
    return windows.reshape(len(padded), -1, math.prod(size))
