"""Where the examples of a mini-batch lie in a tensor: to take some of them out, and to put them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One dimension, of size outer * examples * inner, whose middle factor numbers the examples.

    >>> Rows(dim=0).take(torch.randn(8, 3), torch.tensor([1, 5]), of=8).shape
    torch.Size([2, 3])
    >>> Rows(dim=0, inner=49).take(torch.randn(8 * 49, 3), torch.tensor([1, 5]), of=8).shape
    torch.Size([98, 3])

    One of `outer` and `inner` may be -1: what is left of the dimension's size. `of` is how
    many examples there are.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    # whether all entries along the dimension are alike: then they lie in any order
    alike: bool = field(default=False, compare=False)

    @property
    def alone(self) -> bool:
        """Whether the dimension has the examples and nothing else."""
        return self.outer == self.inner == 1

    def apart(self, tensor: Tensor, of: int) -> tuple[Tensor, int]:
        """A view that has a dimension for the examples alone, and that dimension."""
        if self.alone:
            return tensor, self.dim
        shape = tensor.shape
        apart = (*shape[: self.dim], self.outer, of, self.inner, *shape[self.dim + 1 :])
        # a view, as a dimension is only taken apart
        return tensor.view(apart), self.dim + 1

    def take(self, tensor: Tensor, examples: Tensor, of: int) -> Tensor:
        """The examples at these indices, with the order that the dimensions have in memory."""
        apart, dim = self.apart(tensor, of)
        taken = _take(apart, dim, examples)
        return taken if self.alone else taken.flatten(self.dim, self.dim + 2)

    def put_back(self, taken: Tensor, examples: Tensor, of: int) -> Tensor:
        """`taken` at these indices of `of` examples, zero elsewhere."""
        apart, dim = self.apart(taken, len(examples))
        shape = [of if d == dim else size for d, size in enumerate(apart.shape)]
        whole = apart.new_zeros(shape).index_copy_(dim, examples, apart)
        return whole if self.alone else whole.flatten(self.dim, self.dim + 2)

    def weigh(self, tensor: Tensor, weights: Tensor) -> Tensor:
        """Each example times its weight."""
        apart, dim = self.apart(tensor, len(weights))
        shaped = weights.to(tensor.dtype).view([-1 if d == dim else 1 for d in range(apart.dim())])
        weighed = apart * shaped
        return weighed if self.alone else weighed.flatten(self.dim, self.dim + 2)

    def norms(self, tensor: Tensor, of: int) -> Tensor:
        """The l2 norm of each example, in float32 for half types."""
        apart, dim = self.apart(tensor, of)
        others = [d for d in range(apart.dim()) if d != dim]
        wide = torch.promote_types(apart.dtype, torch.float32)
        if not others:
            return apart.to(wide).abs()
        norms: Tensor = torch.linalg.vector_norm(apart, 2, others, dtype=wide)
        return norms


class Layout(NamedTuple):
    """The order of a tensor's dimensions in memory, the widest first; and those that are expanded."""

    order: list[int]
    expanded: list[int]

    @classmethod
    def of(cls, strides: Sequence[int]) -> Layout:
        """The layout that these strides make."""
        order = sorted(range(len(strides)), key=strides.__getitem__, reverse=True)
        return cls(order, [d for d, stride in enumerate(strides) if stride == 0])

    @property
    def back(self) -> list[int]:
        """The permutation that undoes `order`."""
        return [self.order.index(d) for d in range(len(self.order))]

    def once(self, tensor: Tensor) -> Tensor:
        """`tensor` without the repetitions, its dimensions in `order`."""
        for dim in self.expanded:
            tensor = tensor.narrow(dim, 0, 1)
        return tensor.permute(self.order)


def without_gaps(tensor: Tensor) -> Tensor:
    """`tensor` as `Rows.take` of all examples would give it: its own order of strides, and no gaps."""
    layout = Layout.of(tensor.stride())
    dense = layout.once(tensor).contiguous().permute(layout.back)
    return dense.expand(tensor.shape) if layout.expanded else dense


def _take(tensor: Tensor, dim: int, examples: Tensor) -> Tensor:
    """`index_select` that keeps the order of strides, and expanded dimensions expanded."""
    if tensor.stride(dim) == 0:
        return tensor.narrow(dim, 0, len(examples))
    layout = Layout.of(tensor.stride())
    taken = layout.once(tensor).index_select(layout.order.index(dim), examples).permute(layout.back)
    if not layout.expanded:
        return taken
    return taken.expand([len(examples) if d == dim else size for d, size in enumerate(tensor.shape)])
