"""What an operator is to its backward: how grad_output lies, and the two products with what is kept."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fxprop.ops.keep import Keep

# of input, weight and bias; None for what is not needed
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# of input and weight
Pair = tuple[Tensor | None, Tensor | None]
# whether those of input and weight are needed
Needed = tuple[bool, bool]
# tensors that take part besides input, weight and bias, as the offsets of experts' rows
Others = tuple[Tensor, ...]


class Form(Protocol):
    """One call of an operator: its constants, and its backward's parts."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, others: Others) -> Tensor:
        """The dense operator, bit for bit."""

    def arrange(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """grad_output as all methods below take it, with examples or rows along `rows_dim`."""

    def arrange_input(self, input: Tensor) -> Tensor:
        """The input, with the same rows along `rows_dim`."""

    def restore(self, grads: Pair, input: Tensor, weight: Tensor) -> Pair:
        """Gradients of the arranged input, and of the weight, in the shapes of the two."""

    @property
    def rows_dim(self) -> int:
        """0, or 1 where a batch of matrices comes first."""

    def examples(self, grad: Tensor) -> Tensor:
        """`grad` as [examples, entries]."""

    def scores(self, grad: Tensor, keep: Keep, others: Others) -> Tensor:
        """A score per channel, over all rows."""

    def top(self, scores: Tensor, keep: Keep) -> Tensor:
        """Indices of the k channels with the highest scores, in each run of them."""

    def take(self, grad: Tensor, kept: Tensor, others: Others) -> Tensor:
        """The kept channels of `grad`."""

    def from_kept(
        self,
        grad: Tensor,
        kept: Tensor,
        input: Tensor,
        weight: Tensor,
        others: Others,
        keep: Keep,
        wanted: Needed,
    ) -> Pair:
        """The gradients of input and weight from what `take` gives."""

    def products(
        self,
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        others: Others,
        wanted: Needed,
    ) -> Pair:
        """The dense gradients of an arranged input, and of the weight."""

    def of_rows(self, others: Others, kept: Tensor) -> Others:
        """`others` for the rows `kept` alone, which are in order."""

    def bias(self, grad: Tensor, kept: Tensor | None, weight: Tensor, shape: torch.Size) -> Tensor:
        """The bias's gradient: sums of `grad`, or of its channels `kept`, zero elsewhere."""


def sums_per_channel(grad: Tensor, dims: tuple[int, ...], kept: Tensor | None, shape: torch.Size) -> Tensor:
    """The sums of `grad` over `dims`; with `kept`, the channels it has, in a tensor of `shape`."""
    sums = grad.sum(dims)
    return sums if kept is None else grad.new_zeros(shape).index_copy_(0, kept, sums)
