"""grad_input and grad_weight from kept entries, by the compiled loops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprop.ops.entries import product_loops as loops
from fxprop.ops.entries.calls import Call
from fxprop.ops.entries.geometry import Geometry, Kind, taps_of
from fxprop.ops.entries.layouts import Layout, as_it_lies, flat, from_rows, known, to_rows
from fxprop.ops.entries.rooms import Rooms
from fxprop.ops.entries.select import Kept
from fxprop.ops.entries.threads import ranges, run, tasks


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
    # channels of the input in one group
    width: int

    @property
    def examples(self) -> int:
        return len(self.kept.counts)

    @property
    def channels(self) -> int:
        """Rows of the weight."""
        return self.features * self.call.matrices

    @property
    def steps(self) -> int:
        """Multiply-adds of a product."""
        return self.kept.value.size * self.of.row

    @property
    def is_linear(self) -> bool:
        """Whether it has no spatial dimensions."""
        return not self.of.size

    @property
    def is_covered(self) -> bool:
        """Whether every entry meets every tap, as in all but transposed convolutions with a stride."""
        return len(self.of.kinds) == 1 and int(self.of.kinds[0].lengths.sum()) == self.of.row

    @property
    def begins(self) -> NDArray[np.int64]:
        """Where each example's entries begin, and the end of the last."""
        return np.concatenate([[0], self.kept.counts.cumsum()])


class Target(NamedTuple):
    """Where products are added."""

    numbers: NDArray[Any]
    # None if they lie as the loops have them
    layout: Layout | None
    # whether anything may be there before
    is_raw: bool

    @classmethod
    def of(cls, grad: Tensor, of: Geometry, covered: bool) -> Target:
        """The memory of a gradient, if every row of it is computed at once, or zeros to begin with."""
        layout = Layout.of(grad, of)
        if not covered:
            return cls(np.zeros(len(grad) * layout.size * layout.channels, flat(grad).dtype), None, False)
        return cls(flat(grad), None if layout.is_rows else layout, True)


def gradients(
    work: Work, input: Tensor, weight: Tensor, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of input and weight, in the layouts of the two."""
    by_channel, taps = _by_channel(weight, work.call), taps_of(weight)
    sorted_kinds = [(kind, *_sort_by_place(work, kind)) for kind in work.of.kinds]
    grad_input = grad_weight = None
    with Rooms() as rooms:
        if needs_input:
            rows = to_rows(by_channel, taps, rooms)
            adds = [functools.partial(_add_to_input, work, *of, rows) for of in sorted_kinds]
            grad_input = as_it_lies(_sum(work, input, work.of, adds), input)
        if needs_weight:
            rows = to_rows(input, work.of, rooms)
            adds = [functools.partial(_add_to_weight, work, *of, rows) for of in sorted_kinds]
            grad_weight = _of_channel(_sum(work, by_channel, taps, adds), weight, work.call)
    return grad_input, grad_weight


def _sum(work: Work, like: Tensor, of: Geometry, adds: Sequence[Callable[[Target], None]]) -> Tensor:
    """A gradient in a known layout, with what is added to it."""
    grad = torch.empty_like(known(like))
    target = Target.of(grad, of, work.is_covered)
    for add in adds:
        add(target)
    if not work.is_covered:
        from_rows(target.numbers, of, grad)
    return grad


def _by_channel(weight: Tensor, call: Call) -> Tensor:
    """The weight as [C_out, C_in/groups, *kernel], as it is but for a transposed convolution's."""
    if not call.transposed:
        return weight
    grouped = weight.reshape(call.groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def _of_channel(by_channel: Tensor, weight: Tensor, call: Call) -> Tensor:
    """The gradient of `weight` from that of what `_by_channel` made."""
    if not call.transposed:
        return as_it_lies(by_channel, weight)
    grouped = by_channel.reshape(call.groups, -1, *by_channel.shape[1:])
    return torch.empty_like(weight).copy_(grouped.transpose(1, 2).flatten(0, 1))


def _sort_by_place(work: Work, kind: Kind) -> tuple[Sorted, NDArray[np.int64]]:
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
    run([functools.partial(sort, *part) for part in ranges(work.examples, tasks(len(entries.at)))])
    return entries, ends


def _sort_by_channel(
    work: Work, by_place: Sorted, ends: NDArray[np.int64]
) -> tuple[Sorted, NDArray[np.int64]]:
    """The entries by channel among some examples at a time, and where those of each channel begin."""
    chunks = ranges(work.examples, torch.get_num_threads())
    entries = Sorted.empty(len(by_place.at), by_place.value)
    starts = np.empty((len(chunks), work.channels + 1), np.int64)
    begins = work.begins

    def sort(number: int) -> None:
        loops.sort_by_channel(*by_place, begins, ends, starts[number], *entries, *chunks[number])

    run([functools.partial(sort, number) for number in range(len(chunks))])
    return entries, starts


def _add_to_input(
    work: Work, kind: Kind, entries: Sorted, ends: NDArray[np.int64], source: NDArray[Any], into: Target
) -> None:
    begins, of_weight = work.begins, (np.uint64(work.of.row), kind.in_weight)
    # rows of the input: one for each place and group
    size = math.prod(work.of.size) * work.call.groups
    out = (np.uint64(work.width), kind.in_input)
    terms = (*out, source, entries.channel, *of_weight, kind.lengths, entries.value)

    def add_to_rows(first: int, last: int) -> None:
        loops.add_to_rows(into.numbers, *terms, begins[None], first, last, into.is_raw, 0)

    def add_to_places(first: int, last: int) -> None:
        example = size * work.width
        for n in range(first, last):
            if into.is_raw:
                into.numbers[n * example : (n + 1) * example] = 0
            loops.add_to_places(into.numbers, entries.at, *terms, begins[n], ends[n], 0)

    def add_and_move(first: int, last: int) -> None:
        assert into.layout is not None
        loops.add_and_move_examples(
            into.numbers, *into.layout.from_one_row, (entries.at, *terms), size, begins, ends, first, last
        )

    add = add_and_move if into.layout else add_to_rows if work.is_linear else add_to_places
    run([functools.partial(add, *part) for part in ranges(work.examples, tasks(work.steps))])


def _add_to_weight(
    work: Work, kind: Kind, by_place: Sorted, ends: NDArray[np.int64], source: NDArray[Any], into: Target
) -> None:
    entries, starts = _sort_by_channel(work, by_place, ends)
    of_input = (np.uint64(work.width), kind.in_input)
    out = (np.uint64(work.of.row), kind.in_weight)
    terms = (*out, source, entries.at, *of_input, kind.lengths, entries.value, starts)

    def add(first: int, last: int) -> None:
        if into.layout is None:
            loops.add_to_rows(into.numbers, *terms, first, last, into.is_raw, 0)
        else:
            loops.add_and_move_rows(into.numbers, *into.layout.from_one_row, terms, first, last)

    run([functools.partial(add, *part) for part in ranges(work.channels, tasks(work.steps))])
