"""The compiled loops over kept entries: their two orders, and the products with what they meet.

Imported only where numba is installed. Every function works on a range of what it is given and releases the
interpreter's lock, so that threads can share the work: see `threads`. Offsets are unsigned: numba tests
signed ones for wrap-around.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fxprop.ops.entries.compiled import compiled
from fxprop.ops.entries.vectors import VECTOR, add_1_vector, add_4_vectors, add_8_vectors

_U = np.uint64


@compiled
def sort_by_place(
    index: Any, value: Any, count: Any, begins: Any, places: Any, layout: Any,
    ends: Any, at: Any, channel: Any, sorted_value: Any, first: int, last: int,
) -> None:  # fmt: skip
    """The entries of the examples first..last as (at, channel, value), in the order of their positions.

    index, value [examples, k], of which count [examples] are there; those of an example go to at, channel
    and value from begins[example] on, and end at `ends`. For places and layout see `Geometry`.
    """
    positions, features, groups, place_count, matrix_rows, channels_last = layout
    inner = _U(features if channels_last else positions)
    of_group = _U(features // groups)
    counts = np.empty(positions + 1, np.int64)
    split = np.empty((index.shape[1], 2), np.uint32)
    for n in range(first, last):
        counts[:] = 0
        # they are in order, so that no division is needed
        outer, begin = _U(0), _U(0)
        for q in range(count[n]):
            while index[n, q] >= begin + inner:
                begin += inner
                outer += _U(1)
            rest = index[n, q] - begin
            s, c = (outer, rest) if channels_last else (rest, outer)
            split[q, 0], split[q, 1] = s, c
            counts[s + _U(1)] += 1
        total = begins[n]
        for s in range(positions):
            size, counts[s] = counts[s + 1] if places[s] >= 0 else 0, total
            total += size
        ends[n] = total
        behind = _U(n // matrix_rows * features)
        for q in range(count[n]):
            s, c = split[q, 0], split[q, 1]
            if places[s] < 0:
                continue
            to = counts[s]
            counts[s] += 1
            place = _U(n * place_count + places[s])
            at[to] = place if groups == 1 else place * _U(groups) + c // of_group
            channel[to] = behind + c
            sorted_value[to] = value[n, q]


@compiled
def sort_by_channel(
    at: Any, channel: Any, value: Any, begins: Any, ends: Any, starts: Any,
    sorted_at: Any, sorted_channel: Any, sorted_value: Any, first: int, last: int,
) -> None:  # fmt: skip
    """What `sort_by_place` made of the examples first..last, channel after channel, from begins[first] on.

    starts [channels + 1] is written: where the entries of a channel begin.
    """
    starts[:] = 0
    for n in range(first, last):
        for q in range(begins[n], ends[n]):
            starts[channel[q] + _U(1)] += 1
    starts[0] = begins[first]
    for c in range(1, len(starts)):
        starts[c] += starts[c - 1]
    free = starts.copy()
    for n in range(first, last):
        for q in range(begins[n], ends[n]):
            c = channel[q]
            to = free[c]
            free[c] += 1
            sorted_at[to], sorted_channel[to], sorted_value[to] = at[q], c, value[q]


@compiled
def _add(
    out: Any, at: Any, length: Any, source: Any, rows: Any, stride: Any, offset: Any, values: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """As `vectors.add_products`, for any length."""
    done, lanes = _U(0), _U(VECTOR // out.itemsize)
    while done + _U(8) * lanes <= length:
        add_8_vectors(out, at + done, source, rows, stride, offset + done, values, first, last)
        done += _U(8) * lanes
    if done + _U(4) * lanes <= length:
        add_4_vectors(out, at + done, source, rows, stride, offset + done, values, first, last)
        done += _U(4) * lanes
    while done + lanes <= length:
        add_1_vector(out, at + done, source, rows, stride, offset + done, values, first, last)
        done += lanes
    if done < length:
        for q in range(first, last):
            start, factor = rows[q] * stride + offset, values[q]
            for c in range(done, length):
                out[at + c] += factor * source[start + c]


@compiled
def _clear(out: Any, row: int, stride: Any, offsets: Any, lengths: Any) -> None:
    for p in range(len(lengths)):
        at = _U(row) * stride + offsets[p]
        out[at : at + lengths[p]] = 0


@compiled
def add_products(
    out: Any, out_rows: Any, out_stride: Any, out_offsets: Any,
    source: Any, rows: Any, stride: Any, offsets: Any,
    lengths: Any, values: Any, first: int, last: int, fresh: int, fresh_end: int,
) -> None:  # fmt: skip
    """Every entry q from first to last times a row of `source`, added to a row of `out`, piece by piece.

    A piece p of a row has lengths[p] numbers, from offsets[p] on; entries of one row of `out` follow each
    other. The rows fresh..fresh_end of `out`, to which they are in order, hold anything before.
    """
    q = first
    while q < last:
        row, end = out_rows[q], q + 1
        while fresh < fresh_end and fresh <= row:
            _clear(out, fresh, out_stride, out_offsets, lengths)
            fresh += 1
        while end < last and out_rows[end] == row:
            end += 1
        for p in range(len(lengths)):
            at = row * out_stride + out_offsets[p]
            _add(out, at, lengths[p], source, rows, stride, offsets[p], values, q, end)
        q = end
    while fresh < fresh_end:
        _clear(out, fresh, out_stride, out_offsets, lengths)
        fresh += 1


@compiled
def pack(source: Any, rows: int, stride: Any, offsets: Any, lengths: Any, packed: Any) -> None:
    """The pieces of every row one behind the other, and the rows without a gap.

    Scattered over many pages of memory they would cost more to find than to read.
    """
    to = _U(0)
    for r in range(_U(rows)):
        for p in range(len(lengths)):
            start = r * stride + offsets[p]
            for c in range(lengths[p]):
                packed[to + c] = source[start + c]
            to += lengths[p]


@compiled
def move(
    source: Any, of_source: Any, into: Any, of_into: Any, channels: Any, places: Any, first: int, last: int
) -> None:
    """Every number of the examples first..last to where it lies in another layout.

    of_source, of_into: how far apart examples, positions and channels are; places [positions]: where the
    one that has fewer positions has them in the other, which is that with `of_into` if it grows.
    """
    example, position, channel, grows = of_source
    to_example, to_position, to_channel = of_into
    for n in range(_U(first), _U(last)):
        for p in range(_U(len(places))):
            from_ = n * example + (p if grows else places[p]) * position
            to = n * to_example + (places[p] if grows else p) * to_position
            for c in range(channels):
                into[to + c * to_channel] = source[from_ + c * channel]
