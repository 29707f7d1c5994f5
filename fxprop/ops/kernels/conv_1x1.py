"""The backward of 1x1 convolutions as matrix products.

With few output channels left the convolution kernels of the CPU do badly (64 -> 6 channels of 256 x 56 x
56: 18 ms, against 1.5 ms here and 12 ms for the dense gradient); `fxprop bench` shows the effect on
whole models. Same arithmetic, same FLOPs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprop.ops.kernels.layout import is_channels_last


def applies(input: Tensor, weight: Tensor, padding: list[int], groups: int) -> bool:
    """Whether `gradients` covers this convolution (any stride) and is the faster way.

    Half types are left to the convolution kernels, which accumulate the batch in float32; other devices
    because it was not measured there.
    """
    return (
        groups == 1
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.float64)
        and all(size == 1 for size in weight.shape[2:])
        and not any(padding)
    )


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input and grad_weight.

    grad_output [N, k, *spatial_out], input [N, C_in, *spatial], weight [k, C_in, 1, ...]. In
    channels_last the products are over [N * spatial, channels], so that nothing is transposed.
    """
    # a 1x1 kernel meets every stride-th position and no other
    strided = any(step != 1 for step in stride)
    met: Any = (..., *(slice(None, None, step) for step in stride))
    x = input[met] if strided else input
    matrix = weight.flatten(1)  # [k, C_in]
    channels_last = is_channels_last(grad_output)
    grad_input = grad_weight = None
    if channels_last:
        grad = _to_rows(grad_output).flatten(0, -2)  # [N * spatial, k]
        if needs_input:
            rows = grad.mm(matrix)
            grad_input = rows.view(*_to_rows(x).shape).movedim(-1, 1)
        if needs_weight:
            grad_weight = grad.t().mm(_to_rows(x).flatten(0, -2))
    else:
        grad = grad_output.flatten(2)  # [N, k, spatial]
        if needs_input:
            grad_input = matrix.t().matmul(grad).view(x.shape)
        if needs_weight:
            grad_weight = grad.bmm(x.flatten(2).transpose(1, 2)).sum(0)
    if grad_input is not None and strided:
        spread = torch.zeros_like(input)
        spread[met] = grad_input
        grad_input = spread
    return grad_input, None if grad_weight is None else grad_weight.view(weight.shape)


def _to_rows(tensor: Tensor) -> Tensor:
    """[N, C, *spatial] as [N, *spatial, C]."""
    return tensor.movedim(1, -1)
