"""What a channel is: the axes of one use of a weight, by operator.

>>> of_linear(Shapes((8, 512), (1000, 512), (8, 1000)))
Axes(groups=1, features=1000, rows=8, example=1000, multiply_adds=4096000, ...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fxprop.ops.entries.cost import Example
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
    # what one row is to the loops over kept entries; None where they cannot be run
    alone: Example | None = None

    @property
    def n(self) -> int:
        """Output channels or features that one choice is made from."""
        return self.groups if self.depthwise else self.features

    @property
    def channels(self) -> int:
        """Output channels or features of all groups together."""
        return self.groups * self.features

    @property
    def examples(self) -> int | None:
        """What single entries are chosen from, one by one."""
        return None if self.rows is None else self.matrices * self.rows

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


class Shapes(NamedTuple):
    """What axes follow from; input and output are None where they are not known."""

    input: Shape | None
    weight: Shape
    output: Shape | None
    # stride, equation, ...: by the operator's keyword
    constants: Mapping[str, Any] = {}


def of_convolution(of: Shapes) -> Axes | str:
    """Weight [C_out, C_in/groups, *kernel], input and output [N, C, *spatial] or [C, *spatial]."""
    features = of.weight[0] // of.constants.get("groups", 1)
    return _convolution(of, features, _times(of.output, of.weight[1:]), weight_rows=True)


def of_transposed(of: Shapes) -> Axes | str:
    """Weight [C_in, C_out/groups, *kernel]: every entry of the input meets the kernels of its group."""
    return _convolution(of, of.weight[1], _times(of.input, of.weight[1:]), weight_rows=False)


def _convolution(of: Shapes, features: int, multiply_adds: int | None, weight_rows: bool) -> Axes | str:
    groups, rank = of.constants.get("groups", 1), len(of.weight)
    if 0 in of.weight or of.weight[0] % groups:
        return f"weight of shape {of.weight} with groups={groups}"
    rows = example = None
    if of.output is not None:
        rows = of.output[0] if len(of.output) == rank else 1
        example = math.prod(of.output[1 - rank :])
    alone = None
    if of.input is not None and rows and example is not None:
        steps = of.constants.get("dilation", 1)
        joined = weight_rows and groups == 1 and (steps if isinstance(steps, int) else list(steps)[-1]) == 1
        alone = Example.of(example, math.prod(of.input) // rows, of.weight, joined, not weight_rows)
    return Axes(groups, features, rows, example, multiply_adds, features == 1, weight_rows, alone=alone)


def of_linear(of: Shapes) -> Axes | str:
    """Weight [out_features, in_features], input and output [*, features]."""
    if len(of.weight) < 2 or 0 in of.weight:
        return f"weight of shape {of.weight}"
    features = of.weight[0]
    rows = None if of.output is None else math.prod(of.output[:-1])
    alone = Example.of(features, of.weight[1], of.weight, joined=False)
    return Axes(
        1, features, rows, features, _times(of.output, of.weight[1:]), weight_rows=True, alone=alone
    )


def of_addmm(of: Shapes) -> Axes | str:
    """Input [rows, in_features], weight [in_features, out_features]."""
    features = of.weight[1]
    rows = None if of.input is None else of.input[0]
    alone = Example.of(features, of.weight[0], (features, of.weight[0]), joined=False)
    return Axes(1, features, rows, features, _times(of.input, (features,)), alone=alone)


def of_grouped_mm(of: Shapes) -> Axes | str:
    """Input [rows, in_features], weight [experts, in_features, out_features]."""
    if len(of.weight) != 3 or (of.input is not None and len(of.input) != 2):
        return f"grouped_mm of {of.input} and {of.weight}: not the rows of experts"
    experts, _, features = of.weight
    rows = None if of.input is None else of.input[0]
    return Axes(experts, features, rows, features, _times(of.input, (features,)))


def of_matmul(of: Shapes) -> Axes | str:
    """Operands as torch.matmul takes them."""
    if of.input is None:
        return "the rank of its input is known only with example_inputs"
    return _product("matmul", matmul_indices(len(of.input), len(of.weight), of.constants["weight"]), of)


def of_einsum(of: Shapes) -> Axes | str:
    """Operands as the equation names them."""
    equation = of.constants["equation"]
    indices = einsum_indices(equation, of.constants["weight"])
    if indices is None:
        return f"einsum {equation!r} does not name every index of its operands"
    return _product("einsum", indices, of)


def _product(op: str, indices: Indices, of: Shapes) -> Axes | str:
    problem = indices.problem()
    if problem is not None:
        return f"{op}: {problem}"
    sizes = dict(zip(indices.weight, of.weight, strict=True))
    for letter, size in zip(indices.input, of.input or (), strict=False):
        if sizes.setdefault(letter, size) != size:
            return f"{op} of {of.input} and {of.weight} broadcasts, which has no sparse backward"
    parts = (indices.batch, indices.features, indices.contracted)
    batch, features, width = (math.prod(sizes[i] for i in part) for part in parts)
    if of.input is None:
        return Axes(batch, features, None, features, None, matrices=batch)
    rows = math.prod(sizes[i] for i in indices.rows)
    alone = Example.of(features, width, (features, width), joined=False)
    return Axes(batch, features, rows, features, math.prod(sizes.values()), matrices=batch, alone=alone)


def _times(shape: Shape | None, of_weight: Shape) -> int | None:
    return None if shape is None else math.prod(shape) * math.prod(of_weight)
