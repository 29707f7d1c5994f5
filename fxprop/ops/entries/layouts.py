"""From the layouts of torch's tensors to those of the loops, and back."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprop.ops.entries import product_loops as loops
from fxprop.ops.entries.geometry import Geometry
from fxprop.ops.entries.rooms import Rooms
from fxprop.ops.entries.threads import ranges, run, tasks
from fxprop.ops.kernels.layout import lies_channels_last


class Layout(NamedTuple):
    """Where the numbers [N, C, *spatial] lie that the loops have as [N, *padded size, C]."""

    # how far apart examples, positions and channels are
    apart: tuple[int, int, int]
    channels: int
    # [positions]: where they are among those of the padded size
    places: NDArray[np.uint64]
    # positions of the padded size
    size: int

    @classmethod
    def of(cls, tensor: Tensor, of: Geometry) -> Layout:
        """Of a tensor that is `known`."""
        _, channels, *spatial = tensor.shape
        apart = _strides(tensor)
        assert apart is not None
        return cls(apart, channels, _inside(of, spatial), math.prod(of.size))

    @property
    def is_rows(self) -> bool:
        """Whether they lie as the loops have them."""
        return len(self.places) == self.size and self.apart[2] == 1

    @property
    def from_one_row(self) -> tuple[Any, ...]:
        """What `move` is given to move single rows here, one after the other in the same place."""
        return self._here, (*_numbers(0, self.channels, 1), False), np.uint64(self.channels), self.places

    def move(self, here: NDArray[Any], rows: NDArray[Any], to_rows: bool) -> None:
        """All that is here to the rows, or back."""
        example, of_rows = self.size * self.channels, _numbers(self.size * self.channels, self.channels, 1)
        if to_rows:
            ends: tuple[Any, ...] = (here, (*self._here, True), rows, of_rows)
        else:
            ends = (rows, (*of_rows, False), here, self._here)
        move = functools.partial(loops.move, *ends, np.uint64(self.channels), self.places)
        run([functools.partial(move, *part) for part in ranges(len(rows) // example, tasks(len(rows)))])

    @property
    def _here(self) -> tuple[Any, ...]:
        return _numbers(*self.apart)


def _numbers(*values: int) -> tuple[Any, ...]:
    return tuple(map(np.uint64, values))


def known(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy whose numbers lie in an order known here."""
    return tensor if _strides(tensor) else tensor.contiguous()


def as_it_lies(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the layout that `torch.empty_like` has."""
    return tensor if _strides(like) else torch.empty_like(like).copy_(tensor)


def flat(tensor: Tensor) -> NDArray[Any]:
    """The numbers as they lie in memory, without a gap."""
    found: NDArray[Any] = torch.as_strided(tensor, (tensor.numel(),), (1,)).numpy()
    return found


def to_rows(tensor: Tensor, of: Geometry, rooms: Rooms) -> NDArray[Any]:
    """[N, C, *spatial] as the flat [N, *padded size, C]; its own memory if it lies so."""
    tensor = known(tensor)
    layout = Layout.of(tensor, of)
    if layout.is_rows:
        return flat(tensor)
    rows = rooms.take(len(tensor) * layout.size * layout.channels, tensor.dtype).numpy()
    layout.move(flat(tensor), rows, to_rows=True)
    return rows


def from_rows(rows: NDArray[Any], of: Geometry, into: Tensor) -> None:
    """The inverse of `to_rows`."""
    Layout.of(into, of).move(flat(into), rows, to_rows=False)


def _strides(tensor: Tensor) -> tuple[int, int, int] | None:
    """How far apart examples, positions and channels are; None where they lie in no order known here."""
    channels, positions = tensor.shape[1], math.prod(tensor.shape[2:])
    if tensor.dim() == 2 and tensor.is_contiguous():
        return channels, channels, 1
    if tensor.is_contiguous():
        return channels * positions, 1, positions
    return (channels * positions, channels, 1) if lies_channels_last(tensor) else None


def _inside(of: Geometry, spatial: list[int]) -> NDArray[np.uint64]:
    """Where the positions of the input are among those of the padded one."""
    whole = np.arange(math.prod(of.size), dtype=np.uint64).reshape(of.size)
    begins = zip(of.begin, spatial, strict=True)
    return whole[tuple(slice(begin, begin + size) for begin, size in begins)].ravel()
