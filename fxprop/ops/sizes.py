"""What a site's shapes say: groups, output channels, and the multiply-adds of its forward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fxprop.ops.product import Indices, einsum_indices, matmul_indices
from fxprop.plan import Shape


class Sizes(NamedTuple):
    """See the fields of `Site`."""

    groups: int
    out_channels: int
    multiply_adds: int | None


def sizes(
    op: str, input: Shape | None, weight: Shape, output: Shape | None, constants: Mapping[str, Any]
) -> Sizes | str:
    """The sizes of one use of a weight, or why it cannot have a sparse backward.

    >>> sizes("linear", (8, 512), (1000, 512), (8, 1000), {})
    Sizes(groups=1, out_channels=1000, multiply_adds=4096000)
    """
    if op in ("matmul", "einsum"):
        return _product(op, input, weight, constants)
    if op == "addmm":
        return Sizes(1, weight[1], None if input is None else input[0] * math.prod(weight))
    if op == "grouped_mm":
        if len(weight) != 3 or (input is not None and len(input) != 2):
            return f"grouped_mm of {input} and {weight}: not the rows of experts"
        experts, in_features, out_features = weight
        return Sizes(
            experts,
            experts * out_features,
            None if input is None else input[0] * in_features * out_features,
        )
    groups = constants.get("groups", 1)
    if len(weight) < 2 or 0 in weight or weight[0] % groups:
        return f"weight of shape {weight} with groups={groups}"
    if op.startswith("conv_transpose"):
        # every entry of the input meets the kernel of every output channel of its group
        return Sizes(
            groups, weight[1] * groups, None if input is None else math.prod(input) * math.prod(weight[1:])
        )
    return Sizes(groups, weight[0], None if output is None else math.prod(output) * math.prod(weight[1:]))


def _product(op: str, input: Shape | None, weight: Shape, constants: Mapping[str, Any]) -> Sizes | str:
    side = constants["weight"]
    indices: Indices | None
    if op == "einsum":
        indices = einsum_indices(constants["equation"], side)
        if indices is None:
            return f"einsum {constants['equation']!r} does not name every index of its operands"
    elif input is None:
        return "the rank of its input is known only with example_inputs"
    else:
        indices = matmul_indices(len(input), len(weight), side)
    problem = indices.problem()
    if problem is not None:
        return f"{op}: {problem}"
    of = dict(zip(indices.weight, weight, strict=True))
    for letter, size in zip(indices.input, input or (), strict=False):
        if of.setdefault(letter, size) != size:
            return f"{op} of {input} and {weight} broadcasts, which has no sparse backward"
    batch, features = (math.prod(of[i] for i in part) for part in (indices.batch, indices.features))
    multiply_adds = None if input is None else math.prod(of.values())
    return Sizes(batch, batch * features, multiply_adds)
