"""The report as tables of text and Markdown, by tabulate."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

from fxprop.report.by_module import Depth, Row, rows_of
from fxprop.report.records import ReportData
from fxprop.report.units import Unit, percent
from fxprop.report.wording import COLUMNS, kept, notes, ops, reasons, remarks, shape, title, total_lines

# no line is longer than the reader's window, unless that is narrower than this
_NARROWEST = 80


_COLLAPSED = (
    "A module in one line stands for all its layers; --all, or report.to_text(depth='all'), lists each."
)


def to_text(report: ReportData, width: int, depth: Depth) -> str:
    """Tables for reading: grouped by module, as wide as `width` allows."""
    width = max(width, _NARROWEST)
    layers = _Layers.of(report, depth)
    collapsed = any(row.layer is None and not row.is_heading for row in layers.rows)
    parts = [
        textwrap.fill(title(report), width),
        _fit(layers, width),
        *(_side_table(header, rows, width) for header, rows in _side_tables(report, depth)),
        *(textwrap.fill(note, width) for note in [*notes(report), *([_COLLAPSED] if collapsed else [])]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_markdown(report: ReportData, depth: Depth) -> str:
    """The same as Markdown, with all columns."""
    table = _Layers.of(report, depth).to_text(_bold_heading, list(_EXTRA), "github")
    side = (_tabulate(rows, header, "github") for header, rows in _side_tables(report, depth))
    parts = [title(report), table, *side, *notes(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- the table of layers ----------------------------------------------------------------------------------


# columns for whoever has room for them, those that say most first
_EXTRA: dict[str, Callable[[Row], str]] = {
    "remarks": lambda row: remarks(row.layer) if row.layer else "",
    "weight": lambda row: shape(row.layer.weight_shape) if row.layer else "",
    "output": lambda row: shape(row.layer.output_shape) if row.layer else "",
    "op": ops,
}


@dataclass(frozen=True)
class _Layers:
    """The table of layers before names and extra columns are chosen."""

    rows: tuple[Row, ...]
    # names of the lines of totals, which follow the rows
    totals: list[str]
    unit: Unit
    # the cells of rows and totals by column
    columns: dict[str, list[str]]

    @classmethod
    def of(cls, report: ReportData, depth: Depth) -> _Layers:
        """Every cell but the names."""
        rows, totals = rows_of(report.listed, depth), total_lines(report)
        blank = [""] * len(totals)
        columns = {"kept": [*map(kept, rows), *blank]}
        for position, column in enumerate(COLUMNS):
            counts = [*(row.total(column) for row in rows), *(sums[position] for _, sums in totals)]
            columns[column] = [report.unit.text(count) for count in counts]
        saved = [*blank[1:], percent(report.totals.saving)] if totals else []
        columns["saved"] = [*(percent(row.saved) for row in rows), *saved]
        extra = {column: [*map(cell, rows), *blank] for column, cell in _EXTRA.items()}
        return cls(rows, [name for name, _ in totals], report.unit, columns | extra)

    def worth_showing(self, column: str) -> bool:
        """Whether a column has something to say: any remark, or something for most of the rows."""
        cells = zip(self.rows, self.columns[column], strict=False)
        filled = [bool(cell) for row, cell in cells if not row.is_heading]
        return any(filled) if column == "remarks" else 2 * sum(filled) >= len(filled)

    def width(self, name: Callable[[Row], str], extra: Sequence[str] = ()) -> int:
        """Of the table: as of one whose only line has the longest cell of each column."""
        longest = [max(cells, key=len) for cells in self._cells(name, extra)]
        return max(map(len, self._tabulate_lines([longest], extra).splitlines()))

    def to_text(self, name: Callable[[Row], str], extra: Sequence[str] = (), style: str = "simple") -> str:
        """The table with names by `name`, and with the columns `extra`."""
        if not self.rows:
            return "No layer was found that could be rewritten."
        lines: list[Any] = []
        for position, line in enumerate(zip(*self._cells(name, extra), strict=True)):
            if style == "simple" and self._is_separated(position):
                lines.append(SEPARATING_LINE)
            lines.append(line)
        return self._tabulate_lines(lines, extra, style)

    def _cells(self, name: Callable[[Row], str], extra: Sequence[str]) -> list[list[str]]:
        names = [*map(name, self.rows), *self.totals]
        return [names, *(self.columns[column] for column in ("kept", *COLUMNS, "saved", *extra))]

    def _is_separated(self, position: int) -> bool:
        """Whether another of the model's own children begins in a line, or the totals."""
        if position in (0, len(self.rows)):
            return position > 0
        if position > len(self.rows):
            return False
        above, row = self.rows[position - 1 : position + 1]
        return above.top != row.top and (row.is_heading or bool(above.parents))

    def _tabulate_lines(self, lines: Sequence[Any], extra: Sequence[str], style: str = "simple") -> str:
        between = ", " if style == "github" else "\n"
        numbers = [f"{column}{between}{self.unit}" for column in COLUMNS]
        return _tabulate(
            lines,
            ["layer", "kept", *numbers, "saved", *extra],
            style,
            ["left", *["right"] * 5, *["left"] * len(extra)],
        )


def _fit(layers: _Layers, width: int) -> str:
    """The table with as many of the extra columns as fit, and names as long as fit."""
    if not layers.rows:
        return layers.to_text(_full_name)
    name = _full_name if layers.width(_full_name) <= width else _short_name
    too_long = layers.width(name) - width
    if too_long > 0:
        room = max(len(_short_name(row)) for row in layers.rows) - too_long
        return layers.to_text(lambda row: _cut(_short_name(row), room))
    extra: list[str] = []
    for column in _EXTRA:
        if layers.worth_showing(column) and layers.width(name, [*extra, column]) <= width:
            extra.append(column)
    return layers.to_text(name, extra)


def _full_name(row: Row) -> str:
    return "  " * len(row.parents) + row.name


def _short_name(row: Row) -> str:
    """Without what the heading above says: ".0.conv1"."""
    return "  " * len(row.parents) + row.name.removeprefix(row.parents[-1] if row.parents else "")


def _bold_heading(row: Row) -> str:
    return f"**{row.name}**" if row.is_heading else row.name


def _cut(text: str, length: int) -> str:
    """`text` without its middle, where it is longer."""
    half = max(length - 1, 2) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


# --- what is not rewritten --------------------------------------------------------------------------------


def _side_tables(report: ReportData, depth: Depth) -> list[tuple[tuple[str, str], list[tuple[str, str]]]]:
    """Tables of two columns: a layer or layers, and why they are not rewritten."""
    tables = []
    for heading, lines in reasons(report):
        if depth != "all" and heading in ("left dense", "skipped"):
            lines = _by_reason(lines)
        tables.append(((heading, "because"), lines))
    return tables


def _by_reason(lines: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One line for all that have the same reason."""
    because: dict[str, list[str]] = {}
    for name, reason in lines:
        because.setdefault(reason, []).append(name)
    return [(_some(names), reason) for reason, names in because.items()]


def _some(names: Sequence[str]) -> str:
    """The first of many."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


def _side_table(header: Sequence[str], rows: list[tuple[str, str]], width: int) -> str:
    longest = max(len(row[0]) for row in rows)
    names = min(max(longest, len(header[0])), width // 2)
    return _tabulate(rows, header, "simple", widths=[names, width - names - 2])


def _tabulate(
    rows: Sequence[Any],
    headers: Sequence[str],
    style: str,
    colalign: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
) -> str:
    if style == "github":
        rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    text = tabulate(
        rows,
        headers,
        tablefmt=style,
        disable_numparse=True,
        colalign=colalign,
        maxcolwidths=widths,
        preserve_whitespace=True,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())
