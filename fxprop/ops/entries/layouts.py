"""From the layouts of torch's tensors to those of the loops, and back."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprop.ops.entries import product_loops as loops
from fxprop.ops.entries.geometry import Geometry
from fxprop.ops.entries.threads import ranges, run, tasks
from fxprop.ops.entries.vectors import VECTOR
from fxprop.ops.kernels.layout import lies_channels_last


def zeros(size: int, like: Tensor) -> Tensor:
    """So many zeros, where a vector may begin; written by whoever comes to them first."""
    dtype = like.numpy().dtype
    raw = np.zeros(size + VECTOR // dtype.itemsize, dtype)
    begin = -raw.ctypes.data % VECTOR // dtype.itemsize
    return torch.from_numpy(raw[begin : begin + size])


def empty(size: int, like: Tensor) -> Tensor:
    """So many numbers, whatever is there."""
    return torch.empty(size, dtype=like.dtype)


def to_rows(tensor: Tensor, of: Geometry) -> Tensor:
    """[N, C, *spatial] as the flat [N, *padded size, C]; its own memory if it lies so."""
    examples, channels, *spatial = tensor.shape
    positions, places = math.prod(spatial), math.prod(of.size)
    strides = _strides(tensor, positions)
    if strides is None:
        tensor = tensor.contiguous()
        strides = (channels * positions, 1, positions)
    if tuple(spatial) == of.size and strides[2] == 1:
        return torch.as_strided(tensor, (tensor.numel(),), (1,))
    rows = zeros(examples * places * channels, tensor)
    source = torch.as_strided(tensor, (tensor.numel(),), (1,)).numpy()
    into = (places * channels, channels, 1)
    _move(source, strides, rows.numpy(), into, examples, channels, _inside(of, spatial), True)
    return rows


def from_rows(rows: Tensor, of: Geometry, like: Tensor) -> Tensor:
    """The inverse of `to_rows`, in the layout that `torch.empty_like` has."""
    examples, channels, *spatial = like.shape
    positions, places = math.prod(spatial), math.prod(of.size)
    found = torch.empty_like(like)
    strides = _strides(found, positions)
    if strides is None:
        return found.copy_(from_rows(rows, of, like.contiguous()))
    if tuple(spatial) == of.size and strides[2] == 1:
        return torch.as_strided(rows, found.shape, found.stride())
    into = torch.as_strided(found, (found.numel(),), (1,)).numpy()
    apart = (places * channels, channels, 1)
    _move(rows.numpy(), apart, into, strides, examples, channels, _inside(of, spatial), False)
    return found


def _strides(tensor: Tensor, positions: int) -> tuple[int, int, int] | None:
    """How far apart examples, positions and channels are; None where they lie in no order known here."""
    channels = tensor.shape[1]
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


def _move(
    source: NDArray[Any], of_source: tuple[int, int, int],
    into: NDArray[Any], of_into: tuple[int, int, int],
    examples: int, channels: int, places: NDArray[np.uint64], grows: bool,
) -> None:  # fmt: skip
    from_ = (*map(np.uint64, of_source), grows)
    to = tuple(map(np.uint64, of_into))
    call = functools.partial(loops.move, source, from_, into, to, np.uint64(channels), places)
    run([functools.partial(call, *part) for part in ranges(examples, tasks())])
