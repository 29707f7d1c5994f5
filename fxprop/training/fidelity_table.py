"""What `fxprop.fidelity` found: products of gradients to shares and ratios, a table, JSON and a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fxprop.errors import ReportError
from fxprop.report.forms.picture import blank, save


@dataclass(frozen=True)
class Products:
    """Products of gradients of the same parameters: dense, sparse, and dense on the next mini-batch."""

    dense_dense: float
    sparse_sparse: float
    sparse_dense: float
    dense_next: float
    sparse_next: float

    @staticmethod
    def total(parts: Sequence[Products]) -> Products:
        """Their sums."""
        return Products(*(math.fsum(getattr(p, name) for p in parts) for name in Products.__annotations__))


@dataclass(frozen=True)
class Row:
    """A layer's weight, the parameters that are no layer's, or all of them."""

    name: str
    # k / n; None where nothing is selected
    kept: float | None
    # kept share of the squared output gradient; None where nothing is selected, or it cannot be seen
    energy: float | None
    products: Products

    @property
    def cosine(self) -> float:
        """Between the sparse gradient and the dense one; NaN where one of them is zero."""
        p = self.products
        return _ratio(p.sparse_dense, math.sqrt(p.sparse_sparse * p.dense_dense))

    @property
    def norm(self) -> float:
        """Norm of the sparse gradient over that of the dense one."""
        return math.sqrt(_ratio(self.products.sparse_sparse, self.products.dense_dense))

    @property
    def progress(self) -> float:
        """On the next mini-batch, by a step of the same rate; dense = 1."""
        return _ratio(self.products.sparse_next, self.products.dense_next)

    @property
    def best_progress(self) -> float:
        """The same with each step at its best rate: its square over that of the norms."""
        return _ratio(max(self.progress, 0.0) ** 2, self.norm**2) if self.norm else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The numbers; None for those that are not defined."""
        values = {
            "kept": self.kept,
            "energy": self.energy,
            "cosine": self.cosine,
            "norm": self.norm,
            "progress": self.progress,
            "best_progress": self.best_progress,
        }
        return {
            "name": self.name,
            **{n: v if v is None or math.isfinite(v) else None for n, v in values.items()},
        }


@dataclass(frozen=True)
class Fidelity:
    """What `fxprop.fidelity` found; `print` shows it."""

    model: str
    # how many mini-batches were compared
    batches: int
    # mean share of the examples that entered the sparse backward
    examples: float
    # layers in graph order, then what belongs to none
    rows: tuple[Row, ...]
    # over all parameters
    overall: Row

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name."""
        return {
            "model": self.model,
            "batches": self.batches,
            "examples": self.examples,
            "layers": [row.to_dict() for row in self.rows],
            "overall": self.overall.to_dict(),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return self.render("simple")

    def render(self, style: str) -> str:
        """The table, in one of tabulate's formats."""
        examples = f", {self.examples:.0%} of the examples" if self.examples < 1 else ""
        headers = ("weight", "kept", "energy", "cosine", "norm", "progress", "at best rate")
        rows = [_cells(row) for row in (*self.rows, self.overall)]
        return "\n".join(
            (
                f"{self.model}: gradients against the dense ones on {self.batches} mini-batches{examples}",
                "",
                tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=_ALIGN),
                "",
                "energy: kept share of the squared output gradient. norm: sparse over dense.",
                "progress: on another mini-batch, by a small step, dense = 1; at best rate: each at its",
                "own. Sparse training can pay where progress times the speed of its steps is above 1.",
            )
        )

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw cosine, energy and progress of each layer; the name's ending says the format.

        Raises ReportError without matplotlib, or if there is no layer to draw.
        """
        layers = [row for row in self.rows if row.kept is not None]
        if not layers:
            raise ReportError("nothing to draw: no layer is sparse")
        figure = blank(max(6.0, 0.35 * len(layers)), 4.5)
        axes: Any = figure.subplots()
        places = range(len(layers))
        for name, marker in (("energy", "s"), ("cosine", "o"), ("progress", "^")):
            values = [getattr(row, name) for row in layers]
            axes.plot(places, [math.nan if v is None else v for v in values], marker + "-", label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xticks(places, [row.name.replace("$", r"\$") for row in layers], rotation=60, ha="right")
        axes.set(title=f"{self.model}: sparse gradients, dense = 1")
        axes.legend(fontsize="small")
        save(figure, file)


_ALIGN = ("left", *("right",) * 6)


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def _cells(row: Row) -> list[str]:
    kept = "-" if row.kept is None else f"{100 * row.kept:.1f} %"
    energy = "-" if row.energy is None else f"{100 * row.energy:.1f} %"
    numbers = (row.cosine, row.norm, row.progress, row.best_progress)
    return [row.name, kept, energy, *("-" if math.isnan(n) else f"{n:.3f}" for n in numbers)]
