"""Numbers to text: the report as tables, by tabulate."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import SEPARATING_LINE, tabulate

if TYPE_CHECKING:
    from fxprop.report.report import Layer, Report

_HEADERS = ("layer", "op", "weight", "output", "kept", "dense", "sparse", "executed", "saved", "")
_NUMBERS = ("right",) * 4
_ALIGN = ("left", "left", "left", "left", "right", *_NUMBERS, "left")


def render(report: Report, style: str) -> str:
    """The whole report in a tabulate style: "simple" (text), "github" (Markdown) or "html"."""
    parts = [
        _title(report, style),
        _layer_table(report, style),
        _skipped(report, style),
        _untraced(report, style),
        _totals(report, style),
        *(_prose(line, style) for line in _footnotes(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(report: Report, style: str) -> str:
    counts = {"rewritten": 0, "dense": 0, "skipped": 0}
    for layer in report.layers:
        counts[layer.status] += 1
    text = (
        f"{report.model}: {counts['rewritten']} layers rewritten, {counts['dense']} dense, "
        f"{counts['skipped']} skipped ({report.frontend} front-end, {report.mode} mode)"
    )
    return _prose(text, style)


def _layer_table(report: Report, style: str) -> str:
    layers = [layer for layer in report.layers if layer.status != "skipped"]
    if not layers:
        return _prose("No layer was found that could be rewritten.", style)
    rows: list[Any] = []
    for position, layer in enumerate(layers):
        new_group = position > 0 and _group(layer.name) != _group(layers[position - 1].name)
        if new_group and style == "simple":
            rows.append(SEPARATING_LINE)
        rows.append(_row(layer))
    return _tabulate(rows, _HEADERS, style, colalign=_ALIGN)


def _row(layer: Layer) -> list[str]:
    dense, sparse, executed = (
        None if column is None else column.total for column in (layer.dense, layer.sparse, layer.executed)
    )
    saved = None if dense is None or executed is None or not dense else 1 - executed / dense
    return [
        layer.name,
        layer.op,
        _shape(layer.weight_shape),
        _shape(layer.output_shape),
        f"{layer.k}/{layer.n} {layer.select}" if layer.status == "rewritten" else "all",
        scaled(dense),
        scaled(sparse),
        scaled(executed),
        percent(saved),
        layer.reason or ", ".join(_remarks(layer)),
    ]


def _remarks(layer: Layer) -> list[str]:
    return [
        *([f"with {layer.region}"] if layer.region else []),
        *([f"for {layer.chain}"] if layer.chain else []),
        *(["row-sparse weight gradient"] if layer.weight_grad == "row_sparse" else []),
    ]


def _skipped(report: Report, style: str) -> str:
    rows = [[x.name, x.op, x.reason] for x in report.layers if x.status == "skipped"]
    return _tabulate(rows, ("skipped layer", "op", "reason"), style) if rows else ""


def _untraced(report: Report, style: str) -> str:
    rows = [[name or report.model, reason] for name, reason in report.untraced]
    return _tabulate(rows, ("runs as written", "because"), style) if rows else ""


def _totals(report: Report, style: str) -> str:
    totals = report.totals
    if totals.other is None or totals.dense is None:
        return ""
    assert totals.sparse is not None
    assert totals.executed is not None
    assert totals.saving is not None
    columns = (totals.dense, totals.sparse, totals.executed)
    rows = [
        ["listed layers", *map(scaled, columns), ""],
        ["other", *[scaled(totals.other)] * 3, ""],
        [
            "whole backward",
            *(scaled(column + totals.other) for column in columns),
            percent(totals.saving),
        ],
        ["scoring and top-k (element operations)", "", "", scaled(totals.select_ops), ""],
        ["forward of listed layers", *[scaled(totals.forward)] * 3, ""],
    ]
    return _tabulate(
        rows,
        ("backward FLOPs", "dense", "sparse", "executed", "saved"),
        style,
        colalign=("left", *_NUMBERS),
    )


def _footnotes(report: Report) -> list[str]:
    notes = [
        "FLOPs of one backward pass; one multiply-add = 2 FLOPs. sparse: what the kept entries need. "
        "executed: what the kernels perform. other: products outside the listed layers, and skipped layers."
    ]
    if any(layer.select == "element" for layer in report.layers):
        notes.append(
            "select='element' masks the gradient and runs the dense kernels: its executed equals dense, "
            "nothing is saved on the clock."
        )
    if report.other is None:
        notes.append("FLOPs were not counted: they need example_inputs.")
    if report.note:
        notes.append(report.note)
    return notes


def scaled(number: int | None) -> str:
    """A count with a unit prefix: "4.13 G"; exact numbers are in the JSON."""
    if number is None:
        return "-"
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return str(number)


def percent(share: float | None) -> str:
    """A share as a percentage: "92.1 %"."""
    return "-" if share is None else f"{100 * share:.1f} %"


def _shape(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape))


def _group(name: str) -> str:
    """What separates blocks of rows: the first two parts of a nested name."""
    return ".".join(name.split(".")[:-1][:2])


def _prose(text: str, style: str) -> str:
    return f"<p>{html.escape(text)}</p>" if style == "html" else text


def _tabulate(
    rows: Sequence[Any], headers: Sequence[str], style: str, colalign: Sequence[str] | None = None
) -> str:
    if style == "github":
        rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    text = tabulate(
        rows, headers, tablefmt=style, disable_numparse=True, colalign=colalign, preserve_whitespace=False
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Dicts as CSV; nested dicts become "dense.grad_input", lists "64x3x7x7"."""
    flat = [_flatten(row) for row in rows]
    # a column may be nested in one row and null in another
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": number for inner, number in value.items()})
        else:
            flat[key] = _shape(value) if isinstance(value, list) else value
    return flat
