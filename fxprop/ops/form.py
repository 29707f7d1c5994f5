"""What an operator is to its backward: how grad_output lies, and the two products with what is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from fxprop.ops.entries.calls import Call, Tensors
from fxprop.ops.keep import Keep

# of input, weight and bias; None for what is not needed
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# of input and weight
Pair = tuple[Tensor | None, Tensor | None]


class Operands(NamedTuple):
    """What the backward of a call reads, and which gradients are needed."""

    input: Tensor
    weight: Tensor
    # tensors that take part besides, as the offsets of experts' rows
    others: tuple[Tensor, ...]
    # of input and weight
    needed: tuple[bool, bool]


class Form(ABC):
    """One call of an operator: its constants, and its backward's parts.

    What most operators have in common is done here.
    """

    # the dimension of examples or rows in what `arrange` gives; 1 where a batch of matrices comes first
    rows_dim = 0

    @abstractmethod
    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        """The dense operator's output, bit for bit."""

    def arrange(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """grad_output as all methods below take it."""
        return grad_output

    def arrange_input(self, input: Tensor) -> Tensor:
        """The input, with the same rows along `rows_dim`."""
        return input

    def restore(self, grads: Pair, of: Operands) -> Pair:
        """Gradients of the arranged input, and of the weight, in the shapes of the two."""
        return grads

    def examples(self, grad: Tensor) -> Tensor:
        """`grad` as [examples, entries]."""
        return grad

    @abstractmethod
    def scores(self, grad: Tensor, keep: Keep, of: Operands) -> Tensor:
        """A score per channel, over all rows."""

    def choices(self, grad: Tensor) -> int:
        """How many channels one choice is made from."""
        return grad.shape[1]

    @abstractmethod
    def weight_norms(self, weight: Tensor) -> Tensor:
        """The l2 norm of each channel's part of the weight, as `scores` has its channels."""

    def weighted(self, scores: Tensor, keep: Keep, of: Operands) -> Tensor:
        """l2 scores, with each channel's weight: what its absence costs grad_input."""
        norms = self.weight_norms(of.weight)
        # over several processes they are sums of squares
        return scores * (norms.square() if keep.sync_selection else norms)

    @abstractmethod
    def top(self, scores: Tensor, k: int) -> Tensor:
        """Indices of the k channels with the highest scores, in each run of them."""

    @abstractmethod
    def take(self, grad: Tensor, kept: Tensor, of: Operands) -> Tensor:
        """The kept channels of `grad`."""

    @abstractmethod
    def from_kept(self, grad: Tensor, kept: Tensor, of: Operands, keep: Keep) -> Pair:
        """The gradients of input and weight from what `take` gives."""

    @abstractmethod
    def products(self, grad: Tensor, input: Tensor, weight: Tensor, of: Operands) -> Pair:
        """The dense gradients of an arranged input and the weight; of `of`, only what is not given."""

    def as_call(self, grad: Tensor, of: Operands) -> tuple[Call, Tensors] | None:
        """What it is to the loops over kept entries, with grad, input and weight; None if it is nothing."""
        return None

    def of_call(self, grads: Pair, of: Operands) -> Pair:
        """Gradients of what `as_call` gives, in the shapes of input and weight."""
        return grads

    def others_of_rows(self, kept: Tensor, of: Operands) -> tuple[Tensor, ...]:
        """The others for the rows `kept` alone, which are in order."""
        return of.others

    def bias(self, grad: Tensor, kept: Tensor | None, weight: Tensor, shape: torch.Size) -> Tensor:
        """The bias's gradient: sums of `grad`, or of its channels `kept`, zero elsewhere."""
        raise NotImplementedError(f"{type(self).__name__} has no bias")


def sums_per_channel(grad: Tensor, dims: tuple[int, ...], kept: Tensor | None, shape: torch.Size) -> Tensor:
    """The sums of `grad` over `dims`; with `kept`, the channels it has, in a tensor of `shape`."""
    sums = grad.sum(dims)
    return sums if kept is None else grad.new_zeros(shape).index_copy_(0, kept, sums)
