"""The report as HTML: a page, and a view for notebooks. Templates place what is here or in `wording`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fxprop.policy.files import as_toml
from fxprop.report import wording
from fxprop.report.by_module import Row
from fxprop.report.forms.diff_colours import as_html
from fxprop.report.records import Layer, ReportData
from fxprop.report.units import percent
from fxprop.version import __version__


def to_page(report: ReportData, diff: str, backward: str = "") -> str:
    """A complete page in one file; `diff` and `backward` are code to show, or empty."""
    shown = Markup(as_html(diff)) if diff else ""
    return _render("page.html.j2", report, diff=shown, backward=backward)


def to_fragment(report: ReportData) -> str:
    """What a notebook shows: the totals, and the layers with bars."""
    return _render("fragment.html.j2", report)


def _render(name: str, report: ReportData, **more: Any) -> str:
    loader = PackageLoader("fxprop.report.forms")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    # the macros see no arguments of `render`
    environment.globals.update(wording=wording, percent=percent)
    css, script = (Markup(loader.get_source(environment, file)[0]) for file in ("report.css", "sort.js"))
    versions = {"version": __version__, "torch": torch.__version__}
    template = environment.get_template(name)
    return template.render(view=View(report), css=css, script=script, **versions, **more)


def _breakable(name: str) -> Markup:
    """A qualified name that breaks into lines at its dots."""
    return Markup(".<wbr>").join(name.split("."))


class Fact(NamedTuple):
    """One of the few numbers at the top."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Line:
    """A row of the table of layers, with its bar."""

    layer: Layer
    report: ReportData
    # the largest dense count of all layers, whose bar is the longest
    longest: int

    @cached_property
    def row(self) -> Row:
        """The same as a row of the text table."""
        return Row(self.layer.name, (self.layer,))

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """FLOPs of both gradients, by column; 0 where unknown."""
        return {column: self.row.total(column) or 0 for column in wording.COLUMNS}

    @cached_property
    def text(self) -> Mapping[str, str]:
        """The counts as they are printed."""
        return {column: self.report.unit.text(self.row.total(column)) for column in wording.COLUMNS}

    @property
    def saved(self) -> int:
        """FLOPs that are not executed."""
        return self.counts["dense"] - self.counts["executed"]

    @property
    def saved_text(self) -> str:
        """The same as it is printed."""
        return self.report.unit.text(None if self.layer.dense is None else self.saved)

    @property
    def share(self) -> float:
        """The share saved of the layer's dense backward; -1, which sorts last, where there is none."""
        return -1.0 if self.row.saved is None else self.row.saved

    @property
    def dense_width(self) -> float:
        """The length of the bar, in percent of the longest."""
        return round(100 * self.counts["dense"] / self.longest, 2)

    @property
    def executed_share(self) -> float:
        """The part of the bar that is executed, in percent of it."""
        return round(100 * self.counts["executed"] / (self.counts["dense"] or 1), 2)

    @property
    def spoken(self) -> str:
        """What the bar shows, in words."""
        return f"dense {self.text['dense']}, executed {self.text['executed']} {self.report.unit}"


@dataclass(frozen=True)
class View:
    """What the templates show of a report."""

    report: ReportData

    @property
    def counted(self) -> bool:
        """Whether there are numbers."""
        return self.report.totals.saving is not None

    @property
    def headline(self) -> str:
        """What a reader takes away."""
        saving = self.report.totals.saving
        if saving is None:
            return "the rewrite"
        clock = self.report.clock
        faster = "" if clock is None else f", {clock.basis} step {clock.step:.1f}x as fast"
        return f"{percent(saving)} of the backward's FLOPs saved{faster}"

    @property
    def title(self) -> str:
        """As in the text form."""
        return wording.title(self.report).partition(": ")[2]

    @cached_property
    def rows(self) -> list[Line]:
        """The layers that could be rewritten, in graph order."""
        layers = self.report.listed
        longest = max((layer.dense.total for layer in layers if layer.dense), default=0) or 1
        return [Line(layer, self.report, longest) for layer in layers]

    @property
    def facts(self) -> list[Fact]:
        """The whole backward, dense and executed, and the layer that saves most."""
        totals, unit = self.report.totals, self.report.unit
        if totals.dense is None or totals.executed is None or totals.other is None:
            return []
        dense, executed = totals.dense + totals.other, totals.executed + (totals.other_executed or 0)
        facts = [
            Fact("backward, dense", f"{unit.text(dense)} {unit}"),
            Fact("backward, executed", f"{unit.text(executed)} {unit}"),
            Fact("saved", percent(totals.saving), f"{unit.text(dense - executed)} {unit}"),
        ]
        if (clock := self.report.clock) is not None:
            basis = f"{clock.basis}, {clock.machine}"
            facts += [
                Fact("backward on the clock", f"{clock.backward:.1f}x", f"as fast ({basis})"),
                Fact("whole step on the clock", f"{clock.step:.1f}x", f"as fast ({basis})"),
            ]
        most = max(self.rows, key=lambda row: row.saved, default=None)
        if most is not None and most.saved > 0:
            others = sum(row.saved == most.saved for row in self.rows) - 1
            text = f"{most.saved_text} {unit}, {percent(most.saved / (dense - executed))} of what is saved"
            text += f"; tied with {others} other{'s' * (others > 1)}" if others else ""
            facts.append(Fact("saves most", _breakable(most.layer.name), text))
        return facts

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The model's own children, in the order of the bars, with how many bars each has."""
        tops = [row.layer.name.partition(".")[0] for row in self.rows]
        return [(top, len(list(bars))) for top, bars in itertools.groupby(tops)]

    @property
    def policy(self) -> str:
        """The policy as a TOML file."""
        return "" if self.report.policy is None else as_toml(self.report.policy)
