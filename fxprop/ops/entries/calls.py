"""What a call of an operator is to the loops over kept entries."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fxprop.ops.entries.cost import Example
from fxprop.ops.entries.geometry import Geometry, geometry


class Tensors(NamedTuple):
    """The operands of a call, and the gradient of its output."""

    grad: Tensor
    input: Tensor
    weight: Tensor


class Call(NamedTuple):
    """A convolution, transposed or not; one without spatial dimensions is a linear layer.

    grad [N, C_out, *spatial_out], input [N, C_in, *spatial], weight [C_out, C_in/groups, *kernel], of a
    transposed one [C_in, C_out/groups, *kernel].
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool = False
    groups: int = 1
    # of a linear layer: N / matrices rows meet each; the weight has the rows of all, one behind the other
    matrices: int = 1

    def geometry(self, grad: Tensor, input: Tensor, weight: Tensor) -> Geometry:
        """How the numbers lie that an entry of `grad` meets."""
        shape = (input.shape[2:], grad.shape[2:], weight.shape[2:])
        constants = (self.stride, self.padding, self.dilation)
        return geometry(
            *(tuple(of) for of in shape),
            input.shape[1] // self.groups,
            self.groups,
            *(tuple(of) for of in constants),
            self.transposed,
        )

    def example(self, of: Tensors) -> Example:
        """What the backward of one example is made of."""
        joined = self.groups == 1 and not self.transposed and self.dilation[-1:] == [1]
        entries, input = math.prod(of.grad.shape[1:]), math.prod(of.input.shape[1:])
        return Example.of(entries, input, of.weight.shape, joined, self.transposed)
