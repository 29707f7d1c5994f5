"""The compiled selection: the largest entries of each example, in one pass over memory and a little more.

Imported only where numba is installed. A few entries, evenly spaced, say how large the smallest kept one is
about; what is larger is gathered as it is read, and among that little the choice is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fxprop.ops.entries.compiled import compiled
from fxprop.ops.entries.vectors import MASKED, lowest_bit, mask_larger

# one in so many entries is looked at for the first guess, but no fewer than this, up to one in four; the
# guess is so many deviations too low
_SPARSE, _SAMPLE, _SAFETY = 128, 128, 2.5
_U = np.uint64


@compiled
def _kth(keys: Any, m: int, k: int, shift: Any, histogram: Any, part: Any) -> Any:
    """The k-th largest of the first m keys, how many are larger, and how many are equal to it.

    By histograms of the highest 11 bits, which `shift` leaves, and of 8 more at a time among what is in
    question then; `part` has room for m keys.
    """
    above, size, down, bins = 0, m, np.int64(shift), 2048
    for j in range(m):
        part[j] = keys[j]
    while True:
        histogram[:bins] = 0
        top = np.int64(0)
        for j in range(size):
            b = (part[j] >> _U(down)) & _U(bins - 1)
            histogram[b] += 1
            top = max(top, np.int64(b))
        while above + histogram[top] < k:
            above += histogram[top]
            top -= 1
        left = 0
        for j in range(size):
            key = part[j]
            part[left] = key
            left += np.int64((key >> _U(down)) & _U(bins - 1)) == top
        size = left
        if down == 0 or size == 1:
            return part[0], above, size
        down, bins = max(0, down - 8), 256


@compiled
def _gather(row: Any, magnitude: Any, least: Any, places: Any) -> int:
    """How many magnitudes of the row are larger than `least`; their places are written, in order."""
    m, j, n = 0, _U(0), _U(len(row))
    while j + _U(MASKED) <= n:
        mask: Any = mask_larger(row, j, magnitude, least)
        while mask:
            places[m] = j + lowest_bit(mask)
            m += 1
            mask &= mask - _U(1)
        j += _U(MASKED)
    while j < n:
        places[m] = j
        m += (row[j] & magnitude) > least
        j += _U(1)
    return m


@compiled
def select(
    grad: Any, bits: Any, k: int, magnitude: Any, nan: Any, shift: Any,
    index: Any, value: Any, count: Any, tied: Any, first: int, last: int,
) -> None:  # fmt: skip
    """The k largest magnitudes of the rows first..last of `grad` [rows, n], zeros left out, in their order.

    bits: the rows as unsigned integers; magnitude, nan: of these, all bits but the sign, and the magnitude
    that every NaN ranks as; shift: see `_kth`.
    Written are index and value [rows, k], count [rows], and tied [rows]: whether some, but not all, of
    entries with equal magnitudes would be kept. Which of them is then left to the caller.
    """
    n = grad.shape[1]
    zero = nan ^ nan
    histogram = np.zeros(2048, np.int32)
    keys, part, places = np.empty(n, bits.dtype), np.empty(n, bits.dtype), np.empty(n, np.uint32)
    step = max(1, n // max(1, min(max(_SAMPLE, n // _SPARSE), n // 4)))
    share = k / n
    for r in range(first, last):
        row = bits[r]
        least = zero
        if step > 1:
            size = 0
            for j in range(0, n, step):
                keys[size] = min(row[j] & magnitude, nan)
                size += 1
            # so far down that more than k are larger, nearly always
            rank = 2 + int(share * size + _SAFETY * (share * (1 - share) * size) ** 0.5)
            if rank < size:
                least = _kth(keys, size, rank, shift, histogram, part)[0]
            if least == nan:
                least = zero  # every NaN ranks alike, whatever its bits
        m = _gather(row, magnitude, least, places)
        if m < k and least > zero:
            m = _gather(row, magnitude, zero, places)
        for j in range(m):
            keys[j] = min(row[places[j]] & magnitude, nan)
        limit, larger, equal = zero, 0, 0
        if m > k:
            limit, larger, equal = _kth(keys, m, k, shift, histogram, part)
        tied[r] = larger + equal > k
        size = 0
        for j in range(m):
            places[size] = places[j]
            size += keys[j] >= limit
        count[r] = min(size, k)
        for j in range(count[r]):
            index[r, j] = places[j]
            value[r, j] = grad[r, places[j]]


@compiled
def select_nonzero(
    grad: Any, bits: Any, magnitude: Any, index: Any, value: Any, count: Any, first: int, last: int
) -> None:
    """What is not zero of the rows first..last of `grad`, as `select` has it; index has room for all."""
    places = np.empty(grad.shape[1], np.uint32)
    for r in range(first, last):
        count[r] = _gather(bits[r], magnitude, magnitude ^ magnitude, places)
        for j in range(count[r]):
            index[r, j] = places[j]
            value[r, j] = grad[r, places[j]]
