"""The report as a picture, by matplotlib."""

from __future__ import annotations

import os
from typing import IO, Any

from fxprop.errors import ReportError
from fxprop.report.records import ReportData
from fxprop.report.units import percent


def figure(report: ReportData) -> Any:
    """A matplotlib figure: for every layer in graph order a bar, dense, and in it what is executed.

    Raises ReportError without matplotlib, or if the report has no numbers.
    """
    layers = [layer for layer in report.listed if layer.dense is not None]
    if not layers:
        raise ReportError("nothing to draw: the report has no FLOPs, which need example_inputs")
    unit, totals = report.unit, report.totals
    drawn = blank(10, 4.5)
    axes: Any = drawn.subplots()
    positions = range(len(layers))
    for column, colour in (("dense", "#c9ced6"), ("executed", "#1f6feb")):
        heights = [getattr(layer, column).total / unit.size for layer in layers]
        axes.bar(positions, heights, width=0.85, color=colour, label=column)
    clock = report.clock
    faster = ""
    if clock is not None:
        faster = f"\n{clock.basis}: backward {clock.backward:.1f}x, whole step {clock.step:.1f}x as fast"
    axes.set(
        title=f"{report.model}: {percent(totals.saving)} of the backward's FLOPs saved{faster}",
        ylabel=f"backward {unit} per layer",
        xlim=(-0.6, len(layers) - 0.4),
    )
    # a tick where each of the model's children begins
    tops = [layer.name.partition(".")[0] for layer in layers]
    starts = [i for i, top in enumerate(tops) if i == 0 or top != tops[i - 1]]
    axes.set_xticks(
        starts, [_plain(tops[i]) for i in starts], rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return drawn


def blank(width: float, height: float) -> Any:
    """A matplotlib figure of that size in inches; ReportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(
            "a picture needs matplotlib, which is not installed: pip install 'fxprop[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, file: str | os.PathLike[str] | IO[bytes], format: str | None = None) -> None:
    """Write a matplotlib figure; the name's ending says the format where `format` does not."""
    try:
        drawn.savefig(file, format=format)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write the picture to {file!s}: {error}") from error


def _plain(name: str) -> str:
    """`name` without what matplotlib would read as a formula."""
    return name.replace("$", r"\$")
