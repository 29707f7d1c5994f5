"""The layers of a report by module path: rows for layers and for modules, with sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from fxprop.report.records import Layer

# up to which module level to show rows; None: chosen by `readable_depth`
Depth = int | Literal["all"] | None
Column = Literal["dense", "sparse", "executed"]

# models of so few layers are shown whole
_FEW = 12


@dataclass(frozen=True)
class Row:
    """A layer, or a module with the sums over its layers."""

    # qualified name
    name: str
    layers: tuple[Layer, ...]
    # names of the modules with a row of their own that it belongs to, outermost first
    parents: tuple[str, ...] = ()
    # whether it is a module whose layers follow in rows of their own
    is_heading: bool = False

    @property
    def layer(self) -> Layer | None:
        """The layer, where the row is one; None for a module."""
        return self.layers[0] if len(self.layers) == 1 else None

    @property
    def top(self) -> str:
        """The outermost module with a row of its own that it belongs to, or itself."""
        return (self.parents or (self.name,))[0]

    def total(self, column: Column) -> int | None:
        """FLOPs of both gradients of all its layers; None where unknown."""
        counts = [getattr(layer, column) for layer in self.layers]
        return None if None in counts else sum(count.total for count in counts)

    @property
    def saved(self) -> float | None:
        """The share of the dense backward that is not executed; None where there is none."""
        dense, executed = self.total("dense"), self.total("executed")
        return None if not dense or executed is None else 1 - executed / dense


def rows_of(layers: Sequence[Layer], depth: Depth = None) -> tuple[Row, ...]:
    """Rows down to module level `depth`: headings with subtotals, and below them modules and layers.

    Level 1 is the model's own children. Rows that are no headings add up to the whole.
    """
    levels = readable_depth(layers) if depth is None else depth
    if levels == "all":
        levels = _deepest(layers)
    return tuple(_rows(_tree(layers), levels, ()))


def _deepest(layers: Sequence[Layer]) -> int:
    return max((layer.name.count(".") + 1 for layer in layers), default=1)


def readable_depth(layers: Sequence[Layer]) -> int | Literal["all"]:
    """The deepest level that collapses: at which rows are at most half as many as layers."""
    if len(layers) <= _FEW:
        return "all"
    tree = _tree(layers)
    counts = {0: 1}
    for level in range(1, _deepest(layers) + 1):
        count = sum(not row.is_heading for row in _rows(tree, level, ()))
        if count > max(len(layers) / 2, 1):
            break
        counts[level] = count
    most = max(counts.values())
    # where a deeper level would show the same rows under longer names
    return next(level for level, count in counts.items() if count == most) or 1


@dataclass
class _Node:
    name: str
    level: int
    layers: list[Layer] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    @cached_property
    def all_layers(self) -> tuple[Layer, ...]:
        below = (layer for child in self.children.values() for layer in child.all_layers)
        return (*self.layers, *below)


def _tree(layers: Sequence[Layer]) -> _Node:
    root = _Node("", 0)
    for layer in layers:
        node = root
        for part in layer.name.split("."):
            if part not in node.children:
                name = f"{node.name}.{part}" if node.level else part
                node.children[part] = _Node(name, node.level + 1)
            node = node.children[part]
        node.layers.append(layer)
    return root


def _rows(node: _Node, depth: int, parents: tuple[str, ...]) -> Iterator[Row]:
    layers = node.all_layers
    if len(layers) == 1:
        yield Row(layers[0].name, layers, parents)
        return
    if node.level >= depth:
        yield Row(node.name, layers, parents)
        return
    # a module with one child and nothing else is not worth a line
    if node.level and len(node.children) + len(node.layers) > 1:
        yield Row(node.name, layers, parents, is_heading=True)
        parents = (*parents, node.name)
    for layer in node.layers:
        yield Row(layer.name, (layer,), parents)
    for child in node.children.values():
        yield from _rows(child, depth, parents)
