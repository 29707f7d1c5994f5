"""Measurements as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fxprop.errors import ReportError
from fxprop.report.forms.picture import blank, save
from fxprop.timing.measurement import Measurement


def plot(measurements: Mapping[str, Measurement], file: str | os.PathLike[str]) -> None:
    """Draw backward time over keep, dense = 1, with the ideal that the FLOPs saved allow.

    >>> plot({"resnet50": fxprop.measure(model, [0.5, 0.25, 0.1, 0.05], (x,))}, "speed.svg")

    The file's name says the format (.svg, .png, ...). Whiskers are the quartiles over the rounds. Raises
    ReportError without matplotlib, or if no policy has one keep for all.
    """
    lines = {name: _points(measurement) for name, measurement in measurements.items()}
    if not any(lines.values()):
        raise ReportError("nothing to draw over keep: give policies with one keep each (--keep 0.25 0.05)")
    figure = blank(7, 4.5)
    axes: Any = figure.subplots()
    for name, points in lines.items():
        keeps, times, below, above, ideal = zip(*points, strict=True)
        drawn = axes.errorbar(keeps, times, yerr=(below, above), marker="o", capsize=3, label=name)
        axes.plot(keeps, ideal, linestyle=":", color=drawn[0].get_color(), label=f"{name}: FLOPs left")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="keep", ylabel="backward time, dense = 1", ylim=(0, None))
    axes.legend(fontsize="small")
    save(figure, file)


def _points(measurement: Measurement) -> list[tuple[float, ...]]:
    """(keep, median time, quartiles' distances from it, ideal), by falling keep; dense is 1, at keep 1."""
    points = [(1.0, 1.0, 0.0, 0.0, 1.0)]
    for variant in measurement.variants:
        if variant.keep is not None:
            low, middle, high = measurement.speedups(variant)
            time = 1 / middle
            points.append((variant.keep, time, time - 1 / high, 1 / low - time, 1 - variant.saving))
    return sorted(points, reverse=True) if len(points) > 1 else []
