"""Convolutions in a row: the one downstream computes only the channels that the one upstream will keep.

Upstream is a region (convolution, batch-norm, perhaps ReLU) whose scores come from the first examples and
whose norm gets gradients for kept channels only. Then all that it reads of its grad_output is the first
examples, and its kept channels of the others. So the backward downstream computes grad_input for the first
examples, lets upstream choose, and computes only the chosen channels for the rest: the same gradients, for
about k / n of the work.

What autograd carries between the two is a placeholder of the right shape; the channels go beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprop.errors import OpError
from fxprop.ops.compiling import is_compiling
from fxprop.ops.keep import Keep
from fxprop.ops.kernels.layout import take_channels
from fxprop.ops.scores import part_of


class Handed(NamedTuple):
    """Channels `kept` of a gradient, [N, k, *spatial], that is zero elsewhere."""

    kept: Tensor
    grad: Tensor
    # what went through autograd in its place
    placeholder: Tensor


@dataclass
class ChainEnd:
    """What a region's autograd node has for the convolution behind it."""

    # (the node, grad_output of the first examples) -> the channels it will keep
    choose: Callable[[Any, Tensor], Tensor]
    score_fraction: float
    handed: Handed | None = None
    # the node's saved tensors, if `choose` has read them: checkpointing hands out each but once
    _saved: tuple[Any, ...] | None = None

    def look(self, node: Any) -> tuple[Any, ...]:
        """The node's saved tensors, before its own backward."""
        self._saved = tuple(node.saved_tensors)
        return self._saved

    def saved_of(self, node: Any) -> tuple[Any, ...]:
        """The node's saved tensors, in its own backward."""
        saved, self._saved = self._saved, None
        return tuple(node.saved_tensors) if saved is None else saved

    def take(self, grad_output: Tensor) -> Handed | None:
        """What was handed over in place of `grad_output`, once; None if nothing was."""
        handed, self.handed = self.handed, None
        if handed is not None and grad_output.data_ptr() != handed.placeholder.data_ptr():
            raise OpError(
                "chained=True promises that the input of this convolution comes from one region and is "
                "used nowhere else, but it has another use, whose gradient was added"
            )
        return handed


def upstream_of(input: Tensor, keep: Keep) -> Any | None:
    """The autograd node of the region that `input` comes from; None where nothing can be handed to it."""
    if not keep.chained or keep.select != "channel" or is_compiling():
        return None
    node = input.grad_fn
    return node if isinstance(getattr(node, "chain", None), ChainEnd) else None


def hand_over(
    upstream: Any,
    grad: Tensor,
    weight: Tensor,
    input: Tensor,
    grad_input_of: Callable[[Tensor, Tensor, Tensor], Any],
) -> Tensor:
    """Give `upstream` the channels of grad_input that it keeps; returns the placeholder for autograd.

    grad [N, k, *spatial_out] and weight [k, C_in, *kernel] are what this convolution keeps.
    `grad_input_of(grad, weight, shaped)` is its backward; of `shaped` only size and layout are read.
    """
    end: ChainEnd = upstream.chain
    first = part_of(grad, end.score_fraction)
    count = len(first)
    probe = grad_input_of(first, weight, input[:count])
    kept = end.choose(upstream, probe)
    pieces = [take_channels(probe, kept)]
    if count < len(grad):
        shaped = torch.empty_like(input[count:, : len(kept)])
        pieces.append(grad_input_of(grad[count:], weight.index_select(1, kept), shaped))
    placeholder = grad.new_zeros(()).expand(input.shape)
    end.handed = Handed(kept, torch.cat(pieces), placeholder)
    return placeholder
