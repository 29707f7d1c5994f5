"""grad_input and grad_weight from kept entries, by the compiled loops."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprop.ops.entries import product_loops as loops
from fxprop.ops.entries.calls import Call
from fxprop.ops.entries.geometry import Geometry, Kind, split, taps_of
from fxprop.ops.entries.layouts import empty, from_rows, to_rows, zeros
from fxprop.ops.entries.select import Kept
from fxprop.ops.entries.threads import ranges, run, tasks

# numbers that a core's second cache holds, with room for others
_CACHED = 3 * 2**17
# numbers of a row that are computed at once, at least
_SHORTEST = 64
# how often a row must be met for packing it to pay
_MET = 4


class Sorted(NamedTuple):
    """Entries in one order: where in the padded input, in which row of the weight, and the value."""

    at: NDArray[np.uint32]
    channel: NDArray[np.uint32]
    value: NDArray[Any]

    @classmethod
    def empty(cls, size: int, like: NDArray[Any]) -> Sorted:
        """Room for so many."""
        return cls(np.empty(size, np.uint32), np.empty(size, np.uint32), np.empty(size, like.dtype))


class Work(NamedTuple):
    """One call with its kept entries."""

    call: Call
    of: Geometry
    kept: Kept
    # C_out, positions of grad_output, and whether channels are last in memory
    features: int
    positions: int
    channels_last: bool

    @property
    def examples(self) -> int:
        return len(self.kept.counts)

    @property
    def channels(self) -> int:
        """Rows of the weight."""
        return self.features * self.call.matrices

    @property
    def is_linear(self) -> bool:
        """Whether it has no spatial dimensions. Then every number of the gradients is met, and set."""
        return not self.of.size

    @property
    def begins(self) -> NDArray[np.int64]:
        """Where each example's entries begin, and the end of the last."""
        return np.concatenate([[0], self.kept.counts.cumsum()])


def gradients(
    work: Work, input: Tensor, weight: Tensor, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of input and weight, in the layouts of the two."""
    of, call = work.of, work.call
    weight_layout = taps_of(weight)
    rows = to_rows(_by_channel(weight, call), weight_layout)
    padded = to_rows(input, of)
    grad_padded = (empty if work.is_linear else zeros)(padded.numel(), input) if needs_input else None
    grad_rows = (empty if work.is_linear else zeros)(rows.numel(), weight) if needs_weight else None
    width = input.shape[1] // call.groups
    for kind in of.kinds:
        entries, ends = _by_place(work, kind)
        if grad_padded is not None:
            _add_to_input(work, kind, entries, ends, rows, grad_padded, width)
        if grad_rows is not None:
            _add_to_weight(work, kind, entries, ends, padded, grad_rows, width)
    return (
        None if grad_padded is None else from_rows(grad_padded, of, input),
        None if grad_rows is None else _of_channel(grad_rows, weight_layout, weight, call),
    )


def _by_channel(weight: Tensor, call: Call) -> Tensor:
    """The weight as [C_out, C_in/groups, *kernel], as it is but for a transposed convolution's."""
    if not call.transposed:
        return weight
    grouped = weight.reshape(call.groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def _of_channel(rows: Tensor, layout: Geometry, weight: Tensor, call: Call) -> Tensor:
    """The gradient of `weight` from those of the rows that `_by_channel` made."""
    if not call.transposed:
        return from_rows(rows, layout, weight)
    by_channel = from_rows(rows, layout, _by_channel(weight, call).contiguous())
    grouped = by_channel.reshape(call.groups, -1, *by_channel.shape[1:])
    return torch.empty_like(weight).copy_(grouped.transpose(1, 2).flatten(0, 1))


def _by_place(work: Work, kind: Kind) -> tuple[Sorted, NDArray[np.int64]]:
    """The entries of one kind by example and position, and where those of each example end."""
    kept, begins = work.kept, work.begins
    entries, ends = Sorted.empty(int(begins[-1]), kept.value), np.empty(work.examples, np.int64)
    matrix_rows = max(1, work.examples // work.call.matrices)
    layout = (work.positions, work.features, work.call.groups, math.prod(work.of.size), matrix_rows)
    # of one position the index is the channel: nothing to look for
    last = work.channels_last or work.positions == 1
    sort = functools.partial(
        loops.sort_by_place, *kept, begins, kind.places, (*layout, last), ends, *entries
    )
    run([functools.partial(sort, *part) for part in ranges(work.examples, tasks())])
    return entries, ends


def _add_to_input(
    work: Work, kind: Kind, entries: Sorted, ends: NDArray[np.int64], rows: Tensor, into: Tensor, width: int
) -> None:
    begins, source, out = work.begins, _flat(rows), _flat(into)
    parts = split(kind, max(_SHORTEST, _CACHED // work.channels // _SHORTEST * _SHORTEST))
    packs = len(parts) > 1 and len(entries.at) >= _MET * work.channels

    def packed(part: Kind, threads: bool) -> tuple[NDArray[Any], Any, Any]:
        if not packs:
            return source, np.uint64(work.of.row), part.in_weight
        return _pack(source, work.channels, work.of.row, part.in_weight, part.lengths, threads)

    def add(part: Kind, of_weight: tuple[NDArray[Any], Any, Any], first: int, last: int) -> None:
        fresh = (first, last) if work.is_linear else (0, 0)
        for n in (first,) if work.is_linear else range(first, last):
            end = ends[last - 1] if work.is_linear else ends[n]
            loops.add_products(
                out, entries.at, np.uint64(width), part.in_input,
                of_weight[0], entries.channel, of_weight[1], of_weight[2],
                part.lengths, entries.value, begins[n], end, *fresh,
            )  # fmt: skip

    def pack_and_add(part: Kind, first: int, last: int) -> None:
        add(part, packed(part, False), first, last)

    if len(kind.lengths) == 1:
        # different parts of one tap are different numbers of the input: each thread may have its own
        count = tasks() // len(parts) // (len(parts) if packs else 1)
        examples = ranges(work.examples, max(1, count))
        run([functools.partial(pack_and_add, part, *some) for part in parts for some in examples])
        return
    for part in parts:
        of_weight = packed(part, True)
        run([functools.partial(add, part, of_weight, *some) for some in ranges(work.examples, tasks())])


def _add_to_weight(
    work: Work,
    kind: Kind,
    entries: Sorted,
    ends: NDArray[np.int64],
    padded: Tensor,
    into: Tensor,
    width: int,
) -> None:
    begins, source, out = work.begins, _flat(padded), _flat(into)
    places, single = math.prod(work.of.size), len(kind.lengths) == 1
    example = places * (_SHORTEST if single else width * work.call.groups)
    chunks = ranges(work.examples, math.ceil(work.examples * example / _CACHED))
    parts = [kind]
    if single:
        rows = max(last - first for first, last in chunks) * places
        parts = split(kind, max(_SHORTEST, _CACHED // rows // _SHORTEST * _SHORTEST))
    packs = len(parts) > 1 and work.call.groups == 1 and len(entries.at) >= _MET * work.examples * places

    by_channel = Sorted.empty(len(entries.at), entries.value)
    starts = np.empty((len(chunks), work.channels + 1), np.int64)

    def sort(number: int) -> None:
        loops.sort_by_channel(*entries, begins, ends, starts[number], *by_channel, *chunks[number])

    run([functools.partial(sort, number) for number in range(len(chunks))])

    def task(part: Kind, first: int, last: int) -> None:
        for number, (begin, end) in enumerate(chunks):
            of_input = (source, np.uint64(width), part.in_input)
            if packs:
                inside = source[begin * places * width : end * places * width]
                from_, stride, offsets = _pack(
                    inside, (end - begin) * places, width, part.in_input, part.lengths
                )
                # rows are counted from the first example; unsigned numbers may wrap around
                of_input = (from_, stride, offsets - np.uint64(begin * places) * stride)
            fresh = (first, last) if work.is_linear and number == 0 else (0, 0)
            loops.add_products(
                out, by_channel.channel, np.uint64(work.of.row), part.in_weight,
                of_input[0], by_channel.at, of_input[1], of_input[2],
                part.lengths, by_channel.value, starts[number, first], starts[number, last], *fresh,
            )  # fmt: skip

    channels = ranges(work.channels, max(1, tasks() // len(parts) // (2 if packs else 1)))
    run([functools.partial(task, part, *some) for part in parts for some in channels])


def _flat(tensor: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = tensor.view(-1).numpy()
    return found


def _pack(
    source: NDArray[Any], rows: int, stride: int, offsets: Any, lengths: Any, threads: bool = False
) -> tuple[NDArray[Any], Any, Any]:
    """The pieces of all rows as (numbers, stride, offsets): see `product_loops.pack`."""
    size = lengths.sum()
    # by torch, whose memory begins where a vector may
    packed = torch.empty(rows * int(size), dtype=torch.from_numpy(source[:0]).dtype).numpy()

    def pack(first: int, last: int) -> None:
        here, into = source[first * stride :], packed[first * int(size) :]
        loops.pack(here, last - first, np.uint64(stride), offsets, lengths, into)

    run([functools.partial(pack, *some) for some in ranges(rows, tasks() if threads else 1)])
    return packed, size, np.concatenate([[np.uint64(0)], lengths.cumsum()[:-1]])
