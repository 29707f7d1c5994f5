"""FLOPs of what torch's own counter gets wrong or leaves out; one multiply-add is 2."""

from __future__ import annotations

import math
from typing import Any

import torch


def _conv_backward_flops(
    grad_output: Any,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """2 per multiply-add for each gradient; torch's own formula counts dW `groups` times over."""
    spatial = input if transposed else grad_output  # the smaller side's positions each meet the kernel
    positions = spatial[0] * math.prod(spatial[2:])
    one = 2 * positions * math.prod(weight) if weight else 0
    return int(one) * (bool(output_mask[0]) + bool(output_mask[1]))


def _grouped_mm_flops(mat_a: Any, mat_b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """2 per multiply-add, which torch's counter leaves out: every row meets one expert's matrix."""
    rows, contracted = mat_a
    return int(2 * rows * contracted * mat_b[-1])


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """query @ key.T and scores @ value, for query [N, H, L, E], key [N, _, S, E], value [N, _, S, E_v]."""
    return int(2 * math.prod(query[:3]) * key[-2] * (query[-1] + value[-1]))


def _attention_backward_flops(
    grad_output: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Scores again, and two products for each of the forward's, as torch counts its GPU kernels."""
    return int(2 * math.prod(query[:3]) * key[-2] * (3 * query[-1] + 2 * value[-1]))


FORMULAS = {
    torch.ops.aten.convolution_backward: _conv_backward_flops,
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
    # in torch's own table only from 2.15 on
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def flop_counter() -> Any:
    """torch's FLOP counter with these formulas, which does not ask which module computes what.

    For that it puts hooks on gradients, with which code that calls autograd.grad itself fails.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules:
    """In place of torch.utils.module_tracker.ModuleTracker: all is computed by the model as a whole."""

    parents = frozenset(("Global",))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass
