"""The report as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from fxprop.report.records import ReportData


def to_csv(report: ReportData) -> str:
    """A line per layer; nested dicts of the schema become "dense.grad_input", lists "64x3x7x7"."""
    flat = [_flatten(layer.to_dict()) for layer in report.layers]
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
            flat[key] = "x".join(map(str, value)) if isinstance(value, list) else value
    return flat
