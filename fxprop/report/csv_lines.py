"""Records as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


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
            flat[key] = "x".join(map(str, value)) if isinstance(value, list) else value
    return flat
