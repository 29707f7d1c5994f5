"""How the numbers that an entry of grad_output meets lie in memory: the taps of a convolution's kernel.

The input has its channels last, and so much padding that every entry meets all of its taps at the same
distances: a *place* is where the first of them would be, and a *piece* a run of numbers from there on, that
meets a run of the weight's row for the entry's channel. A transposed convolution with a stride has several
*kinds* of positions, which meet different taps. A linear layer is a convolution without spatial dimensions.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Offsets = NDArray[np.uint64]
Sizes = tuple[int, ...]


class Along(NamedTuple):
    """One spatial dimension."""

    # of the padded input, and where the input begins in it
    size: int
    begin: int
    # by position of grad_output
    places: list[int]
    kinds: list[int]
    # by kind: (tap, its distance from the place)
    taps: list[list[tuple[int, int]]]


class Kind(NamedTuple):
    """The positions that meet the same taps."""

    # [positions]; -1 for positions of other kinds
    places: NDArray[np.int64]
    # of each piece: where it begins behind a place, where in a row of the weight, and its length
    in_input: Offsets
    in_weight: Offsets
    lengths: Offsets


class Geometry(NamedTuple):
    """All that the loops need to know of a call's shapes."""

    # of the padded input, without channels, and where the input begins in it
    size: tuple[int, ...]
    begin: tuple[int, ...]
    kinds: list[Kind]
    # numbers in a row of the weight: taps times the input channels of a group
    row: int


def taps_of(weight: Tensor) -> Geometry:
    """Of a weight [C_out, C_in/groups, *kernel] itself: its taps take the place of positions."""
    return Geometry(tuple(weight.shape[2:]), (0,) * (weight.dim() - 2), [], 0)


def _along(size: int, positions: int, taps: int, stride: int, padding: int, dilation: int) -> Along:
    places = [p * stride for p in range(positions)]
    reach = dilation * (taps - 1)
    end = max(padding + size, (positions - 1) * stride + reach + 1)
    return Along(end, padding, places, [0] * positions, [[(t, t * dilation) for t in range(taps)]])


def _along_transposed(
    size: int, positions: int, taps: int, stride: int, padding: int, dilation: int
) -> Along:
    begin = -(-dilation * (taps - 1) // stride)
    # position p meets input (p + padding - tap * dilation) / stride, where that is a whole number
    kinds = [(p + padding) % stride for p in range(positions)]
    places = [(p + padding) // stride for p in range(positions)]
    of_kinds = [
        [
            (t, begin + (kind - t * dilation) // stride)
            for t in range(taps)
            if (kind - t * dilation) % stride == 0
        ]
        for kind in range(stride)
    ]
    end = max(begin + size, max(places, default=0) + begin + 1)
    return Along(end, begin, places, kinds, of_kinds)


# more layers than most models have; for a large map they take a while
@functools.lru_cache(256)
def geometry(
    input: Sizes, output: Sizes, kernel: Sizes, channels: int, groups: int,
    stride: Sizes, padding: Sizes, dilation: Sizes, transposed: bool,
) -> Geometry:  # fmt: skip
    """Of a call with these spatial sizes; `channels` are the input's in one group. Not to be written to.

    >>> geometry((56, 56), (56, 56), (3, 3), 64, 1, (1, 1), (1, 1), (1, 1), False).size
    (58, 58)
    """
    along = _along_transposed if transposed else _along
    dims = [along(*of) for of in zip(input, output, kernel, stride, padding, dilation, strict=True)]
    size = tuple(dim.size for dim in dims)
    steps = [math.prod(size[d + 1 :]) for d in range(len(size))]
    tap_steps = [math.prod(kernel[d + 1 :]) for d in range(len(size))]
    places = np.zeros(tuple(output), np.int64)
    kind_of = np.zeros(tuple(output), np.int64)
    for d, dim in enumerate(dims):
        shape = [-1 if other == d else 1 for other in range(len(dims))]
        places = places + np.reshape(dim.places, shape) * steps[d]
        kind_of = kind_of * len(dim.taps) + np.reshape(dim.kinds, shape)
    kinds = []
    for number, of_dims in enumerate(itertools.product(*(dim.taps for dim in dims))):
        chosen = [
            (
                sum(distance * step for (_, distance), step in zip(taps, steps, strict=True)),
                sum(tap * step for (tap, _), step in zip(taps, tap_steps, strict=True)),
            )
            for taps in itertools.product(*of_dims)
        ]
        if chosen and (kind_of == number).any():
            places_of = np.where(kind_of == number, places, -1).ravel()
            kinds.append(_kind(places_of, chosen, channels, groups))
    begin = tuple(dim.begin for dim in dims)
    return Geometry(size, begin, kinds, math.prod(kernel) * channels)


def _kind(places: NDArray[np.int64], taps: list[tuple[int, int]], channels: int, groups: int) -> Kind:
    """Neighbouring taps that meet neighbouring numbers are one piece; those of groups lie apart."""
    pieces: list[list[int]] = []
    for distance, tap in taps:
        start, row = distance * channels * groups, tap * channels
        if groups == 1 and pieces and [start, row] == [pieces[-1][i] + pieces[-1][2] for i in (0, 1)]:
            pieces[-1][2] += channels
        else:
            pieces.append([start, row, channels])
    in_input, in_weight, lengths = np.array(pieces, np.uint64).T.copy()
    return Kind(places, in_input, in_weight, lengths)
