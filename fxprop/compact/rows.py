"""Where the examples of a mini-batch lie in a tensor: to take some of them out, and to put them back."""

from __future__ import annotations

from dataclasses import dataclass

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


def without_gaps(tensor: Tensor) -> Tensor:
    """`tensor` as `Rows.take` of all examples would give it: its own order of strides, and no gaps."""
    expanded = _expanded(tensor)
    once = _once(tensor, expanded)
    order = _order(once)
    dense = once.permute(order).contiguous().permute([order.index(d) for d in range(once.dim())])
    return dense.expand(tensor.shape) if expanded else dense


def _take(tensor: Tensor, dim: int, examples: Tensor) -> Tensor:
    """`index_select` that keeps the order of strides, and expanded dimensions expanded."""
    if tensor.stride(dim) == 0:
        return tensor.narrow(dim, 0, len(examples))
    expanded = _expanded(tensor)
    once = _once(tensor, expanded)
    order = _order(once)
    taken = once.permute(order).index_select(order.index(dim), examples)
    taken = taken.permute([order.index(d) for d in range(once.dim())])
    if not expanded:
        return taken
    return taken.expand([len(examples) if d == dim else size for d, size in enumerate(tensor.shape)])


def _expanded(tensor: Tensor) -> list[int]:
    return [d for d in range(tensor.dim()) if tensor.stride(d) == 0 and tensor.size(d) > 1]


def _once(tensor: Tensor, expanded: list[int]) -> Tensor:
    for dim in expanded:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
