"""The report as tables of text and Markdown, by tabulate."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import SEPARATING_LINE, tabulate

from fxprop.report.tree import Depth, Row, rows_of
from fxprop.report.units import percent
from fxprop.report.wording import COLUMNS, kept, notes, ops, reasons, remarks, shape, title, total_lines

if TYPE_CHECKING:
    from fxprop.report.report import Report

# no line is longer than the reader's window, but for one narrower than this
_NARROWEST = 80


_COLLAPSED = (
    "Modules in one line stand for all their layers; --all, or report.to_text(depth='all'), lists each."
)


def to_text(report: Report, width: int, depth: Depth) -> str:
    """Tables for reading: grouped by module, as wide as `width` allows."""
    width = max(width, _NARROWEST)
    collapsed = any(row.layer is None and not row.is_heading for row in _shown(report, depth))
    parts = [
        textwrap.fill(title(report), width),
        _fitting(report, width, depth),
        *(_side_table(header, rows, width) for header, rows in _side_tables(report, depth)),
        *(textwrap.fill(note, width) for note in [*notes(report), *([_COLLAPSED] if collapsed else [])]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_markdown(report: Report, depth: Depth) -> str:
    """The same as Markdown, with all columns."""
    table = _layers(report, depth, list(_EXTRA), _bold_heading, "github")
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


def _worth_showing(column: str, shown: Sequence[Row]) -> bool:
    """Whether a column has something to say: any remark, or something for most of the rows."""
    filled = [bool(_EXTRA[column](row)) for row in shown if not row.is_heading]
    return any(filled) if column == "remarks" else 2 * sum(filled) >= len(filled)


def _fitting(report: Report, width: int, depth: Depth) -> str:
    """The table with as many of the extra columns as fit, and names as long as fit."""
    shown = _shown(report, depth)

    def fits(text: str) -> bool:
        return max(map(len, text.splitlines())) <= width

    name: Callable[[Row], str] = _full_name
    text = _layers(report, depth, [], name)
    if not fits(text):
        name = _short_name
        text = _layers(report, depth, [], name)
    if not fits(text):
        too_long = max(map(len, text.splitlines())) - width
        room = max(len(_short_name(row)) for row in shown) - too_long
        return _layers(report, depth, [], lambda row: _cut(_short_name(row), room))
    extra: list[str] = []
    for column in _EXTRA:
        if not _worth_showing(column, shown):
            continue
        with_column = _layers(report, depth, [*extra, column], name)
        if fits(with_column):
            text, extra = with_column, [*extra, column]
    return text


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


def _shown(report: Report, depth: Depth) -> tuple[Row, ...]:
    return rows_of(report.listed, depth)


def _layers(
    report: Report,
    depth: Depth,
    extra: Sequence[str],
    name: Callable[[Row], str] = _full_name,
    style: str = "simple",
) -> str:
    shown = _shown(report, depth)
    if not shown:
        return "No layer was found that could be rewritten."

    def line(label: str, counts: Iterable[int | None], saved: str = "", of: Row | None = None) -> list[str]:
        return [
            label,
            kept(of) if of else "",
            *map(report.unit.text, counts),
            saved,
            *(_EXTRA[column](of) if of else "" for column in extra),
        ]

    lines: list[Any] = []
    for position, row in enumerate(shown):
        top, above = ((r.parents or (r.name,))[0] for r in (row, shown[position - 1]))
        if position and top != above and (row.is_heading or shown[position - 1].parents):
            lines.append(SEPARATING_LINE)
        lines.append(line(name(row), map(row.total, COLUMNS), percent(row.saved), row))
    totals = [line(label, counts) for label, counts in total_lines(report)]
    if totals:
        totals[-1][5] = percent(report.totals.saving)
        lines += [SEPARATING_LINE, *totals]
    numbers = [f"{column}\n{report.unit}" for column in COLUMNS]
    if style == "github":
        numbers = [f"{column}, {report.unit}" for column in COLUMNS]
        lines = [line for line in lines if line is not SEPARATING_LINE]
    return _tabulate(
        lines,
        ["layer", "kept", *numbers, "saved", *extra],
        style,
        ["left", *["right"] * 5, *["left"] * len(extra)],
    )


# --- what is not rewritten --------------------------------------------------------------------------------


def _side_tables(report: Report, depth: Depth) -> list[tuple[tuple[str, str], list[list[str]]]]:
    """Tables of two columns: a layer or layers, and why they are not rewritten."""
    tables = []
    for heading, lines in reasons(report):
        if depth != "all" and heading in ("left dense", "skipped"):
            lines = _by_reason(lines)
        tables.append(((heading, "because"), [[name, reason] for name, reason in lines]))
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


def _side_table(header: Sequence[str], rows: list[list[str]], width: int) -> str:
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
