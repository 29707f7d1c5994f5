"""The compiled loops over kept entries: their two orders, and the products with what they meet.

Imported only where numba is installed. Every function works on a range of what it is given and releases the
interpreter's lock, so that threads can share the work: see `threads`. Offsets are unsigned: numba tests
signed ones for wrap-around.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fxprop.ops.entries.compiled import compiled
from fxprop.ops.entries.vectors import (
    VECTOR,
    add_1_row,
    add_2_rows,
    add_4_rows,
    add_8_rows,
    add_short_rows,
)

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
    """As `vectors.add_8_rows`, for any number of entries, in the order of their rows, and any length."""
    lanes = _U(VECTOR // out.itemsize)
    q, done = first, length - length % lanes
    if done:
        while q + 8 <= last:
            add_8_rows(out, at, done, source, rows, stride, offset, values, q)
            q += 8
        if q + 4 <= last:
            add_4_rows(out, at, done, source, rows, stride, offset, values, q)
            q += 4
        if q + 2 <= last:
            add_2_rows(out, at, done, source, rows, stride, offset, values, q)
            q += 2
        if q < last:
            add_1_row(out, at, done, source, rows, stride, offset, values, q)
    if done < length:
        q = first
        if at + done + lanes <= len(out):
            # those behind which a whole vector can be read
            q = last
            while q > first and rows[q - 1] * stride + offset + done + lanes > len(source):
                q -= 1
            if q > first:
                add_short_rows(
                    out, at + done, length - done, source, rows, stride, offset + done, values, first, q
                )  # fmt: skip
        while q < last:
            start, factor = rows[q] * stride + offset, values[q]
            for c in range(done, length):
                out[at + c] += factor * source[start + c]
            q += 1


@compiled
def add_to_rows(
    out: Any, out_stride: Any, out_offsets: Any,
    source: Any, rows: Any, stride: Any, offsets: Any,
    lengths: Any, values: Any, starts: Any, first: int, last: int, clears: bool, back: int,
) -> None:  # fmt: skip
    """To the rows first..last their entries times rows of `source`, piece by piece.

    starts [chunks, rows + 1]: where the entries of each row begin. A piece p of a row has lengths[p]
    numbers, from offsets[p] on. `out` begins with the row `back`; with `clears` it holds anything before.
    """
    for row in range(first, last):
        for p in range(len(lengths)):
            at = _U(row - back) * out_stride + out_offsets[p]
            if clears:
                out[at : at + lengths[p]] = 0
            for begins in starts:
                q, end = begins[row], begins[row + 1]
                _add(out, at, lengths[p], source, rows, stride, offsets[p], values, q, end)


@compiled
def add_to_places(
    out: Any, places: Any, out_stride: Any, out_offsets: Any,
    source: Any, rows: Any, stride: Any, offsets: Any,
    lengths: Any, values: Any, first: int, last: int, back: int,
) -> None:  # fmt: skip
    """As `add_to_rows`, where entry q, from first to last, belongs to the row places[q]."""
    q = first
    while q < last:
        place, end = places[q], q + 1
        while end < last and places[end] == place:
            end += 1
        for p in range(len(lengths)):
            at = (place - _U(back)) * out_stride + out_offsets[p]
            _add(out, at, lengths[p], source, rows, stride, offsets[p], values, q, end)
        q = end


@compiled
def move(
    source: Any, of_source: Any, into: Any, of_into: Any, channels: Any, places: Any, first: int, last: int
) -> None:
    """Every number of the examples first..last to where it lies in another layout.

    of_source, of_into: how far apart examples, positions and channels are; places [positions]: where the
    one that has fewer positions has them in the other, which is that with `of_into` if it grows. What is
    between them is set to zero.
    """
    example, position, channel, grows = of_source
    to_example, to_position, to_channel = of_into
    for n in range(_U(first), _U(last)):
        free = n * to_example
        for p in range(_U(len(places))):
            from_ = n * example + (p if grows else places[p]) * position
            to = n * to_example + (places[p] if grows else p) * to_position
            # one of the two has its channels side by side, which compiled code is told
            if grows:
                into[free:to] = 0
                free = to + channels
                for c in range(channels):
                    into[to + c] = source[from_ + c * channel]
            else:
                for c in range(channels):
                    into[to + c * to_channel] = source[from_ + c]
        if grows:
            into[free : (n + _U(1)) * to_example] = 0


@compiled
def add_and_move_rows(
    into: Any, of_into: Any, of_room: Any, channels: Any, places: Any, products: Any, first: int, last: int
) -> None:
    """As `add_to_rows` with its arguments `products`, each row then moved to where it lies in `into`."""
    row, out_offsets, source, rows, stride, offsets, lengths, values, starts = products
    room = np.empty(row, into.dtype)
    for r in range(first, last):
        add_to_rows(
            room, row, out_offsets, source, rows, stride, offsets, lengths, values, starts,
            r, r + 1, True, r,
        )  # fmt: skip
        move(room, of_room, into, of_into, channels, places, r, r + 1)


@compiled
def add_and_move_examples(
    into: Any, of_into: Any, of_room: Any, channels: Any, places: Any, products: Any,
    size: int, begins: Any, ends: Any, first: int, last: int,
) -> None:  # fmt: skip
    """As `add_to_places` for each example of so many places, which is then moved to where it lies."""
    at, width, out_offsets, source, rows, stride, offsets, lengths, values = products
    room = np.empty(_U(size) * of_room[1], into.dtype)
    for n in range(first, last):
        room[:] = 0
        add_to_places(
            room, at, width, out_offsets, source, rows, stride, offsets, lengths, values,
            begins[n], ends[n], n * size,
        )  # fmt: skip
        move(room, of_room, into, of_into, channels, places, n, n + 1)
