"""Where the examples lie in every value of an aten graph, by the symbol of the batch size.

A dimension has the examples if its size has their symbol as a factor. Alone they are numbered by it; where
a view has flattened them with something else (tokens, windows, patches), the views tell how.
"""

from __future__ import annotations

import linecache
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from fxprop.compact.rows import Rows
from fxprop.tracing.source_lines import source_line

if TYPE_CHECKING:
    import sympy


class Unknown(Exception):
    """The examples in a tensor cannot be told apart; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
# a tensor without examples, one with examples, one in which they cannot be found
Found = Rows | None | Unknown

_VIEWS = ("aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias")
# tensors made of nothing but a shape
FACTORIES = (
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.empty",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.empty_strided",
    "aten.new_empty_strided",
)


def name_of(node: fx.Node) -> str:
    """The operator that a node calls, without its overload: "aten.mm"."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet if packet is not None else node.target)


def describe(node: fx.Node) -> str:
    """A node's operator, with the user's line that it belongs to."""
    name = name_of(node) if node.op == "call_function" else node.name
    where = source_line(node.meta.get("stack_trace"))
    if where is None:
        return name
    file, _, number = where.rpartition(":")
    code = linecache.getline(file, int(number)).strip()
    return f"{name} of {where}: {code}" if code else f"{name} of {where}"


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names in the operator's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)  # private: torch has no public way to the names
    if schema is None:
        return {str(number): value for number, value in enumerate(node.args)}
    bound = {argument.name: argument.default_value for argument in schema.arguments}
    bound.update(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    return {**bound, **node.kwargs}


def value_of(argument: Any) -> Any:
    """An argument's value, whether it is a node or stands there itself."""
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def tensors_in(value: Any) -> Iterator[fx.Node]:
    """The nodes in an argument whose value is a tensor, or several."""
    if isinstance(value, fx.Node):
        if not isinstance(value_of(value), NUMBERS):
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def size_of(dim: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression."""
    if isinstance(dim, torch.SymInt):
        return cast("sympy.Expr", dim.node.expr)
    import sympy  # slow, and not needed before a graph is looked at

    return sympy.Integer(dim)


class Examples:
    """The places of the examples in the values of a graph; `symbol` is the number of examples."""

    def __init__(self, symbol: sympy.Symbol) -> None:
        self.symbol = symbol
        self._found: dict[fx.Node, Found | list[Found]] = {}

    def has(self, size: Any) -> bool:
        """Whether the number of examples is part of a size, or of another number."""
        node = getattr(size, "node", None)
        return node is not None and self.symbol in node.expr.free_symbols

    def dims(self, value: Any) -> list[int]:
        """The dimensions that have the examples."""
        return (
            [d for d, size in enumerate(value.shape) if self.has(size)] if isinstance(value, Tensor) else []
        )

    def at(self, node: fx.Node) -> Rows | None:
        """Where the examples lie in a node's tensor, or in all of several; None if it has none.

        Raises Unknown.
        """
        found = self.found(node)
        places = set()
        for one in found if isinstance(found, list) else [found]:
            if isinstance(one, Unknown):
                raise one
            places.add(one)
        places = agreed(places - {None})
        if len(places) > 1:
            raise Unknown("its results have the examples in different places")
        return places.pop() if places else None

    def found(self, node: fx.Node) -> Any:
        """As `at`, with Unknown as a value, and a list for several tensors."""
        return self._found.get(node)

    def put(self, node: fx.Node, found: Found | list[Found]) -> None:
        """Say where they lie: of placeholders."""
        self._found[node] = found

    def follow(self, node: fx.Node) -> None:
        """Find them in what a node computes; its arguments have been gone through."""
        value = node.meta.get("val")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            several = self._found.get(node.args[0])
            self._found[node] = several[node.args[1]] if isinstance(several, list) else several  # type: ignore[index]
        elif isinstance(value, list | tuple):
            self._found[node] = [self._of(node, one) for one in value]
        else:
            self._found[node] = self._of(node, value)

    def _of(self, node: fx.Node, value: Any) -> Found:
        dims = self.dims(value)
        if not dims:
            return None
        if len(dims) > 1:
            return Unknown(f"its result has the examples in {len(dims)} dimensions")
        try:
            return self._find(node, value, dims[0])
        except Unknown as unknown:
            return unknown

    def _find(self, node: fx.Node, value: Tensor, dim: int) -> Rows:
        inputs = list(tensors_in((*node.args, *node.kwargs.values())))
        if name_of(node) in _VIEWS:
            rows = self.at(inputs[0])
            if rows is None:
                raise Unknown("it makes examples of something else")
            return self.of_view(inputs[0].meta["val"].shape, value.shape, rows)
        if name_of(node) in ("aten.as_strided", "aten.as_strided_scatter"):
            return self._strided(node, dim)
        size = size_of(value.shape[dim])
        if size == self.symbol:
            return Rows(dim)
        places = [
            rows
            for rows, tensor in self._with_rows(inputs)
            if size_of(tensor.meta["val"].shape[rows.dim]) == size
        ]
        if not places and (name_of(node) in FACTORIES or self._is_spread(node, value, dim)):
            return replace(self._rows(dim, size_of(1), size), alike=True)
        if name_of(node) == "aten.repeat" and not places:
            once = arguments_of(node)["self"].meta["val"]
            behind = value.dim() - dim
            inner = size_of(once.shape[-behind]) if behind <= once.dim() else size_of(1)
            return self._rows(dim, size / self.symbol / inner, size)
        fixed = [rows for rows in places if not rows.alike] or places
        if len(orders := {(rows.outer, rows.inner) for rows in fixed}) != 1:
            raise Unknown(
                f"it has the examples among others in a dimension of size {size}, in no known order"
            )
        ((outer, inner),) = orders
        return Rows(dim, outer, inner, alike=all(rows.alike for rows in places))

    def _with_rows(self, tensors: Sequence[fx.Node]) -> Iterator[tuple[Rows, fx.Node]]:
        for tensor in tensors:
            rows = self.at(tensor)
            if rows is not None and isinstance(tensor.meta.get("val"), Tensor):
                yield rows, tensor

    def _is_spread(self, node: fx.Node, value: Tensor, dim: int) -> bool:
        """Whether a dimension was made by expanding one of size 1, or none."""
        if name_of(node) != "aten.expand":
            return False
        once = arguments_of(node)["self"].meta["val"].shape
        behind = value.dim() - dim
        return behind > len(once) or once[-behind] == 1

    def _strided(self, node: fx.Node, dim: int) -> Rows:
        """By strides into a tensor whose memory has one example after the other."""
        given = arguments_of(node)
        held, rows = given["self"].meta["val"], self.at(given["self"])
        if rows is None or rows.dim != 0 or rows.outer != 1 or not held.is_contiguous():
            raise Unknown("it addresses memory by strides")
        part = node.meta["val"] if name_of(node) == "aten.as_strided" else given["src"].meta["val"]
        each = product(held.shape) / self.symbol
        (at,) = self.dims(part) if len(self.dims(part)) == 1 else (0,)
        sizes = [size_of(size) for size in part.shape]
        strides = [size_of(value_of(stride)) for stride in given["stride"]]
        within = sum((sizes[d] - 1) * strides[d] for d in range(len(sizes)) if d != at)
        if sizes[at] != self.symbol or strides[at] != each or not (each - within).is_positive:
            raise Unknown("it addresses memory by strides, from one example to the next")
        return Rows(at) if name_of(node) == "aten.as_strided" else rows

    def of_view(self, before: Sequence[Any], after: Sequence[Any], rows: Rows) -> Rows:
        """Where `rows` of a tensor of shape `before` lie once it is viewed as `after`."""
        ahead = product(before[: rows.dim])
        whole = size_of(before[rows.dim])
        outer = self._factor(rows.outer, rows.inner, whole) * ahead
        for dim, size in enumerate(after):
            if self.has(size):
                found = self._rows(dim, (outer / product(after[:dim])).simplify(), size_of(size))
                return replace(found, alike=rows.alike)
        raise Unknown("a view of it has no examples")

    def _factor(self, outer: int, inner: int, whole: sympy.Expr) -> sympy.Expr:
        return whole / self.symbol / inner if outer == -1 else size_of(outer)

    def _rows(self, dim: int, outer: sympy.Expr, size: sympy.Expr) -> Rows:
        inner = (size / self.symbol / outer).simplify()
        numbers = [int(f) if f.is_Integer else -1 for f in (outer, inner)]
        broken = any(f.is_Rational and not f.is_Integer for f in (outer, inner))
        if broken or numbers == [-1, -1] or self.symbol in (outer.free_symbols | inner.free_symbols):
            raise Unknown(f"a view splits its examples: dimension {dim} is of size {size}")
        return Rows(dim, outer=numbers[0], inner=numbers[1])


def agreed(places: Iterable[Rows]) -> set[Rows]:
    """The places that tensors have the examples in; one whose entries are alike follows the others."""
    every = set(places)
    fixed = {rows for rows in every if not rows.alike}
    return {*fixed, *(r for r in every if r.alike and r.dim not in {f.dim for f in fixed})}


def product(shape: Sequence[Any]) -> sympy.Expr:
    """Of sizes."""
    return cast("sympy.Expr", math.prod((size_of(size) for size in shape), start=size_of(1)))
