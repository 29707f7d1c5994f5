"""Where the examples lie once a dimension is flattened, sliced or put together, as formulas of sizes.

A dimension of size outer * n * inner has example e at the places (o * n + e) * inner + i. A view, a slice
or a concatenation keeps that form, with other factors, or it breaks the examples apart: Unknown is raised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from fxprop.compact.rows import Rows

if TYPE_CHECKING:
    import sympy


class Unknown(Exception):
    """The examples in a tensor cannot be told apart; `reason` says why, `node` where it began."""

    node: fx.Node | None = None

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Several(Unknown):
    """A tensor of pairs: several dimensions have the examples, each nothing but them, in their order."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__(f"its result has the examples in {len(dims)} dimensions")
        self.dims = tuple(dims)


def size_of(dim: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression."""
    if isinstance(dim, torch.SymInt):
        return cast("sympy.Expr", dim.node.expr)
    import sympy  # slow, and not needed before a graph is looked at

    return sympy.Integer(dim)


def product(shape: Sequence[Any]) -> sympy.Expr:
    """Of sizes."""
    return cast("sympy.Expr", math.prod((size_of(size) for size in shape), start=size_of(1)))


@dataclass(frozen=True)
class Flattened:
    """Places of examples in dimensions they share with something else; `symbol` is how many there are."""

    symbol: sympy.Symbol

    def rows(self, dim: int, outer: sympy.Expr, size: sympy.Expr) -> Rows:
        """In a dimension of this size, which has `outer` in front of the examples."""
        inner = (size / self.symbol / outer).simplify()
        numbers = [int(f) if f.is_Integer else -1 for f in (outer, inner)]
        broken = any(f.is_Rational and not f.is_Integer for f in (outer, inner))
        if broken or numbers == [-1, -1] or self.symbol in (outer.free_symbols | inner.free_symbols):
            raise Unknown(f"a view splits its examples: dimension {dim} is of size {size}")
        return Rows(dim, outer=numbers[0], inner=numbers[1])

    def viewed(self, before: Sequence[Any], after: Sequence[Any], rows: Rows) -> Rows:
        """Where `rows` of a tensor of shape `before` lie once it is viewed as `after`."""
        outer = self._outer(rows, size_of(before[rows.dim])) * product(before[: rows.dim])
        for dim, size in enumerate(after):
            if self._is_in(size):
                return self.rows(dim, (outer / product(after[:dim])).simplify(), size_of(size))
        raise Unknown("a view of it has no examples")

    def keeps_pairs(self, before: Sequence[Any], after: Sequence[Any]) -> bool:
        """Whether a view leaves each dimension for the examples as it is."""
        ahead = [
            [(product(shape[:d]), size_of(shape[d])) for d in range(len(shape)) if self._is_in(shape[d])]
            for shape in (before, after)
        ]
        return ahead[0] == ahead[1]

    def sliced(self, rows: Rows, whole: sympy.Expr, start: sympy.Expr, size: sympy.Expr) -> Rows:
        """In `size` entries from `start` on, of a dimension of size `whole`."""
        if size == whole:
            return rows
        return replace(self._blocks(rows, whole, start, size, size), alike=rows.alike)

    def padded(self, rows: Rows, size: sympy.Expr, start: sympy.Expr, whole: sympy.Expr) -> Rows:
        """Once `size` entries are the part from `start` on of a dimension of size `whole`."""
        return rows if size == whole else self._blocks(rows, size, start, size, whole)

    def joined(self, parts: Sequence[tuple[Rows, sympy.Expr]]) -> Rows:
        """Of tensors behind each other along the dimension of these places and sizes."""
        first = parts[0][0]
        if {(rows.dim, rows.inner) for rows, _ in parts} != {(first.dim, first.inner)} or first.inner == -1:
            raise Unknown("it puts examples behind each other")
        outer = sum((self._outer(rows, size) for rows, size in parts), start=size_of(0))
        return self.rows(first.dim, outer, sum((size for _, size in parts), start=size_of(0)))

    def _blocks(
        self, rows: Rows, held: sympy.Expr, start: sympy.Expr, size: sympy.Expr, made: sympy.Expr
    ) -> Rows:
        """In a dimension of size `made`, if start and size are whole blocks of all examples."""
        block = (held / self._outer(rows, held)).simplify()
        counts = [(expression / block).simplify() for expression in (start, size, made)]
        if not all(count.is_Integer for count in counts):
            raise Unknown("it picks some of the examples")
        return self.rows(rows.dim, counts[2], made)

    def _is_in(self, size: Any) -> bool:
        return self.symbol in size_of(size).free_symbols

    def _outer(self, rows: Rows, size: sympy.Expr) -> sympy.Expr:
        return size / self.symbol / rows.inner if rows.outer == -1 else size_of(rows.outer)
