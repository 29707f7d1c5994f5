"""Where the examples lie in every value of an aten graph, by the symbol of the batch size.

A dimension has the examples if its size has their symbol as a factor. Alone they are numbered by it; where
a view has flattened them with something else (tokens, windows, patches), the views tell how.
"""

from __future__ import annotations

import linecache
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from fxprop.compact.flattened import Flattened, Several, Unknown, product, size_of
from fxprop.compact.rows import Rows
from fxprop.tracing.source_lines import source_line

if TYPE_CHECKING:
    import sympy


NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
# a tensor without examples, one with examples, one in which they cannot be found
Found = Rows | None | Unknown

_VIEWS = ("aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias")
# the same entries, or some of them over and over
_SAME = (
    *_VIEWS,
    "aten.expand",
    "aten.permute",
    "aten.transpose",
    "aten.t",
    "aten.unsqueeze",
    "aten.squeeze",
)
_BY_STRIDES = ("aten.as_strided", "aten.as_strided_scatter")
# what takes parts of a tensor along a dimension, or puts one into zeros
_PARTS = ("aten.slice", "aten.split", "aten.split_with_sizes", "aten.slice_backward")
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
_FILLED = ("aten.zeros", "aten.ones", "aten.full", "aten.new_zeros", "aten.new_ones", "aten.new_full")


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


class Examples:
    """The places of the examples in the values of a graph; `symbol` is the number of examples."""

    def __init__(self, symbol: sympy.Symbol) -> None:
        self.symbol = symbol
        self._flattened = Flattened(symbol)
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
            self._found[node] = [self._of(node, one, value[:number]) for number, one in enumerate(value)]
        else:
            self._found[node] = self._of(node, value)

    def _of(self, node: fx.Node, value: Any, ahead: Sequence[Any] = ()) -> Found:
        dims = self.dims(value)
        if not dims:
            return None
        try:
            return (
                self._of_pairs(node, value, dims)
                if len(dims) > 1
                else self._find(node, value, dims[0], ahead)
            )
        except Unknown as unknown:
            unknown.node = unknown.node or node
            return unknown

    def _of_pairs(self, node: fx.Node, value: Tensor, dims: Sequence[int]) -> Rows:
        sizes = {size_of(value.shape[d]) for d in dims}
        inputs = list(tensors_in((*node.args, *node.kwargs.values())))
        kept = not self._moves(node) or (
            name_of(node) in _VIEWS
            and isinstance(self.found(inputs[0]), Several)
            and self._flattened.keeps_pairs(inputs[0].meta["val"].shape, value.shape)
        )
        if kept and sizes == {self.symbol} and all(map(self._is_alone, inputs)):
            raise Several(dims)
        raise Unknown(f"its result has the examples in {len(dims)} dimensions")

    def _moves(self, node: fx.Node) -> bool:
        """Whether an operator may give an entry another number among the examples."""
        return name_of(node) in (*_VIEWS, *_PARTS, *_BY_STRIDES, "aten.cat")

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether no dimension of a tensor has the examples and something else."""
        found = self.found(node)
        return found is None or isinstance(found, Several) or (isinstance(found, Rows) and found.alone)

    def _find(self, node: fx.Node, value: Tensor, dim: int, ahead: Sequence[Any]) -> Rows:
        """Where they lie in a node's `value`; `ahead` are those of its results that come before."""
        inputs = list(tensors_in((*node.args, *node.kwargs.values())))
        name, size = name_of(node), size_of(value.shape[dim])
        if name in _VIEWS:
            rows = self.at(inputs[0])
            if rows is None:
                raise Unknown("it makes examples of something else")
            viewed = self._flattened.viewed(inputs[0].meta["val"].shape, value.shape, rows)
            return replace(viewed, alike=rows.alike and (viewed.alone or self._is_uniform(inputs[0])))
        if name in _BY_STRIDES:
            return self._strided(node, dim)
        if name in _PARTS or (name == "aten.cat" and arguments_of(node)["dim"] % value.dim() == dim):
            return self._along(node, value, dim, ahead)
        if size == self.symbol and name not in FACTORIES and all(map(self._is_alone, inputs)):
            return Rows(dim, alike=self._is_spread(node, value, dim))
        held = list(self._with_rows(inputs))
        places = [rows for rows, tensor in held if size_of(tensor.meta["val"].shape[rows.dim]) == size]
        if not places and (name in FACTORIES or self._is_spread(node, value, dim)):
            return replace(self._flattened.rows(dim, size_of(1), size), alike=True)
        if name == "aten.repeat" and not places:
            once = arguments_of(node)["self"].meta["val"]
            behind = value.dim() - dim
            inner = size_of(once.shape[-behind]) if behind <= once.dim() else size_of(1)
            return self._flattened.rows(dim, size / self.symbol / inner, size)
        fixed = [rows for rows in places if not rows.alike] or places
        if len(orders := {(rows.outer, rows.inner) for rows in fixed}) != 1:
            raise Unknown(
                f"it has the examples among others in a dimension of size {size}, in no known order"
            )
        ((outer, inner),) = orders
        return Rows(dim, outer, inner, alike=all(rows.alike for rows in places))

    def _along(self, node: fx.Node, value: Tensor, dim: int, ahead: Sequence[Any]) -> Rows:
        """In part of a tensor, in one that is put into zeros, in some behind each other."""
        given, name = arguments_of(node), name_of(node)
        if name == "aten.cat":
            tensors = list(tensors_in(given["tensors"]))
            parts = [(self.at(t), size_of(t.meta["val"].shape[dim])) for t in tensors]
            if not all(rows is not None and rows.dim == dim for rows, _ in parts):
                raise Unknown("only some of its tensors have examples")
            return self._flattened.joined(cast("list[tuple[Rows, sympy.Expr]]", parts))
        held = given["grad_output" if name == "aten.slice_backward" else "self"]
        rows, shape = self.at(held), held.meta["val"].shape
        if rows is None:
            if size_of(value.shape[dim]) != self.symbol:
                raise Unknown("it makes examples of something else")
            return Rows(dim)
        if given["dim"] % value.dim() != dim:
            return replace(rows, dim=dim)
        size, other = size_of(value.shape[dim]), size_of(shape[dim])
        if name == "aten.slice_backward":
            return self._flattened.padded(rows, other, self._start(given, size), size)
        if value_of(given.get("step", 1)) != 1:
            raise Unknown("it picks some of the examples")
        start = sum((size_of(one.shape[dim]) for one in ahead), start=self._start(given, other))
        return self._flattened.sliced(rows, other, start, size)

    def _start(self, given: dict[str, Any], whole: sympy.Expr) -> sympy.Expr:
        start = size_of(value_of(given.get("start")) or 0)
        return start + whole if start.is_negative else start

    def _is_uniform(self, node: fx.Node) -> bool:
        """Whether all entries of a tensor are one number: a filled one, or a number that was expanded."""
        value = node.meta.get("val")
        if isinstance(value, Tensor) and product(value.shape) == 1:
            return True
        is_same = torch.Tag.pointwise in getattr(node.target, "tags", ()) or name_of(node) in _SAME
        inputs = list(tensors_in((*node.args, *node.kwargs.values())))
        return name_of(node) in _FILLED or (is_same and bool(inputs) and all(map(self._is_uniform, inputs)))

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


def agreed(places: Iterable[Rows]) -> set[Rows]:
    """The places that tensors have the examples in; one whose entries are alike follows the others."""
    every = set(places)
    fixed = {rows for rows in every if not rows.alike}
    return {*fixed, *(r for r in every if r.alike and r.dim not in {f.dim for f in fixed})}
