"""The report as tables of text and Markdown, by tabulate."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import SEPARATING_LINE, tabulate

from fxprop.report.tree import Column, Depth, Row, rows_of
from fxprop.report.units import percent, scaled

if TYPE_CHECKING:
    from fxprop.report.report import Layer, Report

COLUMNS: tuple[Column, ...] = ("dense", "sparse", "executed")
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
        *(_side_table(header, rows, width) for header, rows in _side_tables(report, depth, width)),
        *(textwrap.fill(note, width) for note in [*notes(report), *([_COLLAPSED] if collapsed else [])]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_markdown(report: Report, depth: Depth) -> str:
    """The same as Markdown, with all columns."""
    table = _layers(report, depth, list(_EXTRA), _bold_heading, "github")
    side = (_tabulate(rows, header, "github") for header, rows in _side_tables(report, depth, None))
    parts = [title(report), table, *side, *notes(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(report: Report) -> str:
    """How many layers there are of each kind, and what the numbers below are."""
    counts = {"rewritten": 0, "dense": 0, "skipped": 0}
    for layer in report.layers:
        counts[layer.status] += 1
    return (
        f"{report.model}: {counts['rewritten']} layers rewritten, {counts['dense']} dense, "
        f"{counts['skipped']} skipped ({report.frontend} front-end, {report.mode} mode)"
    )


def notes(report: Report) -> list[str]:
    """What the numbers mean, and what else is to be known of them."""
    totals = report.totals
    if totals.other is None:
        found = ["FLOPs were not counted: they need example_inputs."]
    else:
        found = [
            f"{report.unit} of one backward pass; one multiply-add = 2 FLOPs. sparse: what the kept "
            "entries need. executed: what the kernels perform. other: products outside the listed layers, "
            "and skipped layers.",
            f"Forward of the listed layers: {report.unit.text(totals.forward)} {report.unit}. Scoring and "
            f"top-k: {scaled(totals.select_ops)} element operations.",
        ]
    if any(layer.select == "element" for layer in report.layers):
        found.append(
            "select='element' masks the gradient and runs the dense kernels: its executed equals dense, "
            "nothing is saved on the clock."
        )
    if row_sparse := sum(layer.weight_grad == "row_sparse" for layer in report.layers):
        found.append(f"Layers with a row-sparse weight gradient: {row_sparse}.")
    if chained := sum(layer.chain is not None for layer in report.layers):
        found.append(
            f"Chains: {chained} layers compute those channels of their input's gradient alone that the "
            "layer in front of them reads."
        )
    return [*found, *([report.note] if report.note else [])]


# --- the table of layers ----------------------------------------------------------------------------------


def kept(row: Row) -> str:
    """What is kept: "13/256 channel" of a layer, "4 layers" or "3 of 4 layers" of a module."""
    if row.layer is None:
        rewritten = sum(layer.status == "rewritten" for layer in row.layers)
        whole = len(row.layers)
        return f"{whole} layers" if rewritten == whole else f"{rewritten} of {whole} layers"
    if row.layer.status == "rewritten":
        return f"{row.layer.k}/{row.layer.n} {row.layer.select}"
    return "all"


def remarks(layer: Layer) -> str:
    """What is rewritten with the layer, and what other layers have to do with it."""
    return ", ".join(
        [
            *([f"with {layer.region}"] if layer.region else []),
            *([f"for {layer.chain}"] if layer.chain else []),
            *(["row-sparse weight gradient"] if layer.weight_grad == "row_sparse" else []),
        ]
    )


def shape(sizes: Sequence[int] | None) -> str:
    """ "64x3x7x7"; "-" where unknown."""
    return "-" if sizes is None else "x".join(map(str, sizes))


def _ops(row: Row) -> str:
    """ "conv2d" of a layer, "3 conv2d, 1 linear" of a module."""
    if row.layer is not None:
        return row.layer.op
    counts = Counter(layer.op for layer in row.layers)
    return ", ".join(f"{count} {op}" for op, count in counts.items())


def total_lines(report: Report) -> list[tuple[str, list[int]]]:
    """The sums under the columns: name, and dense, sparse and executed; none without example inputs."""
    totals = report.totals
    if totals.other is None:
        return []
    sums = [getattr(totals, column) for column in COLUMNS]
    whole = [count + totals.other for count in sums]
    return [("listed layers", sums), ("other", [totals.other] * 3), ("whole backward", whole)]


# columns for whoever has room for them, those that say most first
_EXTRA: dict[str, Callable[[Row], str]] = {
    "remarks": lambda row: remarks(row.layer) if row.layer else "",
    "weight": lambda row: shape(row.layer.weight_shape) if row.layer else "",
    "output": lambda row: shape(row.layer.output_shape) if row.layer else "",
    "op": _ops,
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
    return rows_of([layer for layer in report.layers if layer.status != "skipped"], depth)


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


def _side_tables(
    report: Report, depth: Depth, width: int | None
) -> list[tuple[tuple[str, str], list[list[str]]]]:
    """Tables of two columns: a layer or layers, and why they are not rewritten."""

    def of(status: str) -> list[list[str]]:
        because: dict[str, list[str]] = {}
        for layer in report.layers:
            if layer.status == status:
                of_op = f" ({layer.op})" if status == "skipped" else ""
                because.setdefault(str(layer.reason), []).append(layer.name + of_op)
        if depth == "all":
            return [[name, reason] for reason, names in because.items() for name in names]
        return [[_some(names), reason] for reason, names in because.items()]

    tables = [
        (("left dense", "because"), of("dense")),
        (("skipped", "because"), of("skipped")),
        (
            ("runs as written", "because"),
            [[name or report.model, reason] for name, reason in report.untraced],
        ),
    ]
    return [(header, rows) for header, rows in tables if rows]


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
