"""Memory of its own for a call, which later calls use again."""

from __future__ import annotations

import contextlib
from collections import deque

import torch
from torch import Tensor

# bytes: larger memory is mapped anew at each call by glibc, too
_LARGEST_ROOM = 2**25
_spare: deque[Tensor] = deque()


class Rooms:
    """Memory for one call, which later ones use again: to be given pages costs more than to fill them.

    >>> with Rooms() as rooms:
    ...     rooms.take(1000, torch.float32)
    """

    def __init__(self) -> None:
        self._taken: list[Tensor] = []

    def __enter__(self) -> Rooms:
        return self

    def take(self, numbers: int, dtype: torch.dtype) -> Tensor:
        """So many, whatever is there; no longer ours when the call ends."""
        size, room = numbers * dtype.itemsize, None
        # several threads may be here
        with contextlib.suppress(IndexError):
            room = _spare.pop()
        if room is None or room.numel() < size:
            room = torch.empty(size, dtype=torch.uint8)
        self._taken.append(room)
        return room[:size].view(dtype)

    def __exit__(self, *_: object) -> None:
        _spare.extend(room for room in self._taken if room.numel() <= _LARGEST_ROOM)
