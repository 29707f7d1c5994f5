"""The indices of products: which of them are output features, which are summed, which are batches."""

from __future__ import annotations

import string
from typing import Literal, NamedTuple

# which operand is the weight
WeightSide = Literal["left", "right"]


class Indices(NamedTuple):
    """The indices of a product of an input and a weight, one letter each."""

    input: str
    weight: str
    output: str

    @property
    def batch(self) -> str:
        """In both operands and the output: separate weights."""
        return "".join(i for i in self.weight if i in self.input and i in self.output)

    @property
    def features(self) -> str:
        """In the weight and the output alone."""
        return "".join(i for i in self.weight if i not in self.input)

    @property
    def contracted(self) -> str:
        """In both operands alone."""
        return "".join(i for i in self.weight if i not in self.output)

    @property
    def rows(self) -> str:
        """In the input and the output alone."""
        return "".join(i for i in self.input if i not in self.weight)

    def problem(self) -> str | None:
        """Why this product has no sparse backward; None if it has one."""
        for of in self:
            if len(set(of)) < len(of):
                return "an index is repeated in one operand"
        if set(self.output) - set(self.input + self.weight):
            return "an index of the output is in no operand"
        if (set(self.rows) | set(self.features)) - set(self.output):
            return "an index is summed in one operand alone"
        return None if self.features else "the weight has no output features"


def matmul_indices(input_dims: int, weight_dims: int, weight: WeightSide) -> Indices:
    """The indices of `torch.matmul`; batch dimensions are taken to be of equal size."""
    letters = iter(string.ascii_letters)
    contracted = next(letters)
    row = next(letters) if input_dims > 1 else ""
    feature = next(letters) if weight_dims > 1 else ""
    batch = "".join(next(letters) for _ in range(max(input_dims, weight_dims, 2) - 2))
    matrices = {
        "right": (row + contracted, contracted + feature),
        "left": (contracted + row, feature + contracted),
    }
    of_input, of_weight = matrices[weight]
    in_order = row + feature if weight == "right" else feature + row
    return Indices(
        batch[len(batch) - max(input_dims - 2, 0) :] + of_input,
        batch[len(batch) - max(weight_dims - 2, 0) :] + of_weight,
        batch + in_order,
    )


def einsum_indices(equation: str, weight: WeightSide) -> Indices | None:
    """The indices of a two-operand einsum; None for one that is written in another way."""
    operands, arrow, output = equation.replace(" ", "").partition("->")
    left, comma, right = operands.partition(",")
    if not comma or "," in right or "." in equation:
        return None
    if not arrow:
        # as einsum: the indices that appear once, in alphabetical order
        output = "".join(sorted(i for i in set(left + right) if (left + right).count(i) == 1))
    return Indices(left, right, output) if weight == "right" else Indices(right, left, output)
