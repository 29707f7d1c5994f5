"""The gradients from kept entries as one operator, which torch.compile and torch.export take whole."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import torch
from torch import Tensor

from fxprop import progress
from fxprop.ops.entries.calls import Call, Tensors
from fxprop.ops.kernels.layout import lies_channels_last

_log = logging.getLogger("fxprop")

# the types that the loops were called for
_called: set[torch.dtype] = set()


def _first_call(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Tells of the first call for a type, which compiles the loops that numba has not kept on disk."""
    if dtype in _called:
        return contextlib.nullcontext()
    _called.add(dtype)
    _log.info("fxprop: compiling the loops over kept entries for %s, unless they are kept on disk", dtype)
    return progress.stage("compiling the loops over kept entries")


@torch.library.custom_op("fxprop::entry_gradients", mutates_args=())
def entry_gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    k: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    groups: int,
    matrices: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_input, grad_weight and the kept part of `grad`, by the compiled loops; empty what is not needed.

    >>> torch.ops.fxprop.entry_gradients(grad, x, w, None, 25, [], [], [], False, 1, 1, [True, True, False])

    Args:
        grad, input, weight: as `calls.Call` has them, like the constants that follow.
        scores: [examples, entries], to choose by; None for the magnitudes.
        k: how many entries are kept of each example; 0 for all that are not zero.
        needs: which of the three are wanted.
    """
    if not (grad.numel() and input.numel()):
        of = zip((input, weight, grad), needs, strict=True)
        return tuple(torch.zeros_like(x) if needed else grad.new_empty(0) for x, needed in of)  # type: ignore[return-value]
    call = Call(stride, padding, dilation, transposed, groups, matrices)
    with _first_call(grad.dtype):
        found = _gradients(call, Tensors(grad, input, weight), scores, k, needs)
    return tuple(grad.new_empty(0) if one is None else one for one in found)  # type: ignore[return-value]


def _gradients(
    call: Call, of: Tensors, scores: Tensor | None, k: int, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    # numba takes a second to import, and is there only where the operator is called
    from fxprop.ops.entries import products, select

    grad, input, weight = of
    last = lies_channels_last(grad)
    if k == 0:
        kept = select.nonzero(grad, last)
    elif scores is None:
        kept = select.largest(grad, last, k)
    else:
        chosen = scores.topk(min(k, scores.shape[1]), dim=1, sorted=False).indices
        kept = select.given(grad, last, chosen)
    positions = math.prod(grad.shape[2:])
    width = input.shape[1] // call.groups
    work = products.Work(call, call.geometry(*of), kept, grad.shape[1], positions, last, width)
    grad_input, grad_weight = products.gradients(work, input, weight, needs[0], needs[1])
    return grad_input, grad_weight, select.masked(grad, last, kept) if needs[2] else None


@entry_gradients.register_fake
def _(
    grad: Tensor, input: Tensor, weight: Tensor, scores: Tensor | None, k: int, *constants: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of = zip((input, weight, grad), constants[-1], strict=True)
    return tuple(  # type: ignore[return-value]
        torch.empty_like(tensor) if needed else grad.new_empty(0) for tensor, needed in of
    )
