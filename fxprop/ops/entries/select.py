"""The kept entries of a gradient: the largest of each example, or all that are not zero."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprop.ops.entries import select_loops
from fxprop.ops.entries.threads import ranges, run, tasks

# of the types: that of the bits, all of them but the sign, what NaN ranks as, and how far 11 bits are up
_BITS: dict[torch.dtype, tuple[Any, int, int, int]] = {
    torch.float32: (np.uint32, 2**31 - 1, 0x7F800001, 20),
    torch.float64: (np.uint64, 2**63 - 1, 0x7FF0000000000001, 52),
}


class Kept(NamedTuple):
    """Entries by example, in the order of memory."""

    # [examples, most]: where in the example, and the value
    places: NDArray[np.uint32]
    value: NDArray[Any]
    # [examples]: how many of them there are
    counts: NDArray[np.int64]


def rows_of(grad: Tensor, channels_last: bool) -> Tensor:
    """[examples, n] in the order of memory."""
    return (grad.movedim(1, -1) if channels_last else grad).contiguous().flatten(1)


def largest(grad: Tensor, channels_last: bool, k: int) -> Kept:
    """The k largest magnitudes of each example of `grad` [N, C, *spatial], zeros left out.

    Of equal ones `torch.topk` decides, and NaN is the largest, as it is there.
    """
    rows = rows_of(grad, channels_last)
    kind, magnitude, nan, shift = _BITS[grad.dtype]
    array = rows.numpy()
    kept = _empty(array, min(k, array.shape[1]))
    tied = np.empty(len(array), np.bool_)
    numbers = (kind(magnitude), kind(nan), kind(shift))
    call = functools.partial(select_loops.select, array, array.view(kind), k, *numbers, *kept, tied)
    run([functools.partial(call, *part) for part in _parts(array)])
    for n in np.flatnonzero(tied):
        chosen = grad[n].flatten().abs().topk(k, sorted=False).indices
        _replace(kept, rows, int(n), _in_memory(chosen, grad, channels_last))
    return kept


def given(grad: Tensor, channels_last: bool, chosen: Tensor) -> Kept:
    """The entries with the indices `chosen` [N, k] of the flattened examples."""
    rows = rows_of(grad, channels_last)
    kept = _empty(rows.numpy(), chosen.shape[1])
    for n, of_example in enumerate(chosen):
        _replace(kept, rows, n, _in_memory(of_example, grad, channels_last))
    return kept


def nonzero(grad: Tensor, channels_last: bool) -> Kept:
    """Every entry that is not zero."""
    array = rows_of(grad, channels_last).numpy()
    kind, magnitude, *_ = _BITS[grad.dtype]
    kept = _empty(array, int(np.count_nonzero(array, axis=1).max(initial=0)))
    call = functools.partial(select_loops.select_nonzero, array, array.view(kind), kind(magnitude), *kept)
    run([functools.partial(call, *part) for part in _parts(array)])
    return kept


def masked(grad: Tensor, channels_last: bool, kept: Kept) -> Tensor:
    """`grad` with all else at zero, in its layout."""
    there = np.arange(kept.places.shape[1]) < kept.counts[:, None]
    rows = torch.zeros_like(rows_of(grad, channels_last))
    rows.numpy()[there.nonzero()[0], kept.places[there]] = kept.value[there]
    if channels_last:
        return rows.view(grad.movedim(1, -1).shape).movedim(-1, 1)
    found = rows.view(grad.shape)
    return found if grad.is_contiguous() else torch.empty_like(grad).copy_(found)


def _parts(array: NDArray[Any]) -> list[tuple[int, int]]:
    return ranges(len(array), tasks(array.size))


def _empty(array: NDArray[Any], most: int) -> Kept:
    shape = (len(array), most)
    return Kept(np.empty(shape, np.uint32), np.empty(shape, array.dtype), np.empty(len(array), np.int64))


def _replace(kept: Kept, rows: Tensor, n: int, index: Tensor) -> None:
    index = index.sort().values
    kept.places[n, : len(index)] = index.numpy()
    kept.value[n, : len(index)] = rows[n][index].numpy()
    kept.counts[n] = len(index)


def _in_memory(index: Tensor, grad: Tensor, channels_last: bool) -> Tensor:
    """Indices of a flattened example as those of what lies in memory."""
    if not channels_last:
        return index
    channels = grad.shape[1]
    positions = grad[0, 0].numel()
    return index % positions * channels + index // positions
