"""What a channel is: the axes of one use of a weight, by operator.

>>> of_linear((8, 512), (1000, 512), (8, 1000), {})
Axes(groups=1, features=1000, rows=8, example=1000, multiply_adds=4096000, ...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fxprop.ops.indices import Indices, einsum_indices, matmul_indices

Shape = tuple[int, ...]


class Axes(NamedTuple):
    """What a selection can choose from, and what the whole costs; None where shapes are not known."""

    # parts of the weight that do not meet: groups of a convolution, matrices of a batched product, experts
    groups: int
    # output channels, or features, of each of them
    features: int
    # examples of a convolution; rows of a product, which meet one of its matrices; of experts, all rows
    rows: int | None
    # entries of grad_output in one example of a convolution or in one row
    example: int | None
    # of the forward
    multiply_adds: int | None
    # whether one output channel of each group is all there is, so that whole groups are chosen
    depthwise: bool = False
    # whether output channels are rows of the weight, as those of a linear layer are
    weight_rows: bool = False
    # matrices that each have `rows` rows of their own
    matrices: int = 1

    @property
    def runs(self) -> int:
        """How many times a choice is made among `n` channels."""
        return 1 if self.depthwise else self.groups

    @property
    def n(self) -> int:
        """Output channels or features that one choice is made from."""
        return self.groups if self.depthwise else self.features

    @property
    def channels(self) -> int:
        """Output channels or features of all groups together."""
        return self.groups * self.features

    @property
    def entries(self) -> int | None:
        """Entries of grad_output."""
        if self.rows is None or self.example is None:
            return None
        return self.matrices * self.rows * self.example


def channel_runs(groups: int, features: int) -> tuple[int, int]:
    """Of a convolution: how many choices there are, and among how many channels each.

    The same number is kept in every group; of a depthwise one, whose groups have one channel, whole groups.
    """
    return (1, groups) if features == 1 else (groups, features)


def of_convolution(
    input: Shape | None, weight: Shape, output: Shape | None, constants: Mapping[str, Any]
) -> Axes | str:
    """Weight [C_out, C_in/groups, *kernel], input and output [N, C, *spatial] or [C, *spatial]."""
    groups = constants.get("groups", 1)
    if len(weight) < 2 or 0 in weight or weight[0] % groups:
        return f"weight of shape {weight} with groups={groups}"
    features = weight[0] // groups
    return _convolution(groups, features, weight, output, _times(output, weight[1:]), weight_rows=True)


def of_transposed(
    input: Shape | None, weight: Shape, output: Shape | None, constants: Mapping[str, Any]
) -> Axes | str:
    """Weight [C_in, C_out/groups, *kernel]: every entry of the input meets the kernels of its group."""
    groups = constants.get("groups", 1)
    if len(weight) < 2 or 0 in weight or weight[0] % groups:
        return f"weight of shape {weight} with groups={groups}"
    return _convolution(groups, weight[1], weight, output, _times(input, weight[1:]), weight_rows=False)


def _convolution(
    groups: int,
    features: int,
    weight: Shape,
    output: Shape | None,
    multiply_adds: int | None,
    weight_rows: bool,
) -> Axes:
    rows = example = None
    if output is not None:
        rows = output[0] if len(output) == len(weight) else 1
        example = math.prod(output[-(len(weight) - 1) :])
    return Axes(groups, features, rows, example, multiply_adds, features == 1, weight_rows)


def of_linear(
    input: Shape | None, weight: Shape, output: Shape | None, constants: Mapping[str, Any]
) -> Axes | str:
    """Weight [out_features, in_features], input and output [*, features]."""
    if len(weight) < 2 or 0 in weight:
        return f"weight of shape {weight}"
    features = weight[0]
    rows = None if output is None else math.prod(output[:-1])
    return Axes(1, features, rows, features, _times(output, weight[1:]), weight_rows=True)


def of_addmm(
    input: Shape | None, weight: Shape, output: Shape | None, constants: Mapping[str, Any]
) -> Axes | str:
    """Input [rows, in_features], weight [in_features, out_features]."""
    rows = None if input is None else input[0]
    return Axes(1, weight[1], rows, weight[1], None if rows is None else rows * math.prod(weight))


def of_grouped_mm(
    input: Shape | None, weight: Shape, output: Shape | None, constants: Mapping[str, Any]
) -> Axes | str:
    """Input [rows, in_features], weight [experts, in_features, out_features]."""
    if len(weight) != 3 or (input is not None and len(input) != 2):
        return f"grouped_mm of {input} and {weight}: not the rows of experts"
    experts, in_features, features = weight
    rows = None if input is None else input[0]
    return Axes(experts, features, rows, features, None if rows is None else rows * in_features * features)


def of_matmul(
    input: Shape | None, weight: Shape, output: Shape | None, constants: Mapping[str, Any]
) -> Axes | str:
    """Operands as torch.matmul takes them."""
    if input is None:
        return "the rank of its input is known only with example_inputs"
    indices = matmul_indices(len(input), len(weight), constants["weight"])
    return _product("matmul", indices, input, weight)


def of_einsum(
    input: Shape | None, weight: Shape, output: Shape | None, constants: Mapping[str, Any]
) -> Axes | str:
    """Operands as the equation names them."""
    indices = einsum_indices(constants["equation"], constants["weight"])
    if indices is None:
        return f"einsum {constants['equation']!r} does not name every index of its operands"
    return _product("einsum", indices, input, weight)


def _product(op: str, indices: Indices, input: Shape | None, weight: Shape) -> Axes | str:
    problem = indices.problem()
    if problem is not None:
        return f"{op}: {problem}"
    of = dict(zip(indices.weight, weight, strict=True))
    for letter, size in zip(indices.input, input or (), strict=False):
        if of.setdefault(letter, size) != size:
            return f"{op} of {input} and {weight} broadcasts, which has no sparse backward"
    batch, features = (math.prod(of[i] for i in part) for part in (indices.batch, indices.features))
    if input is None:
        return Axes(batch, features, None, features, None, matrices=batch)
    rows = math.prod(of[i] for i in indices.rows)
    return Axes(batch, features, rows, features, math.prod(of.values()), matrices=batch)


def _times(shape: Shape | None, of_weight: Shape) -> int | None:
    return None if shape is None else math.prod(shape) * math.prod(of_weight)
