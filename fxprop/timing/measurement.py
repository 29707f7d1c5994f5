"""What `fxprop.measure` found: the steps of each variant, their ratios, and tables of them."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tabulate import tabulate

from fxprop.policy.step_time import Clock


class Step(NamedTuple):
    """Seconds of one training step."""

    forward: float
    backward: float
    optimizer: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self)


_PARTS = (*Step._fields, "total")


class SiteRow(NamedTuple):
    """One site measured alone, in seconds; a region with its batch-norm and ReLU."""

    name: str
    k: int
    n: int
    dense: float
    sparse: float


@dataclass(frozen=True)
class Variant:
    """The measured steps of the model under one policy."""

    name: str
    # share of the backward FLOPs saved, as the report says; 0 for the dense model
    saving: float
    rewritten: int
    # the policy's one keep for all; None for the dense model and where k or rules say more
    keep: float | None
    # the same rounds for every variant
    steps: tuple[Step, ...]
    # bytes of the tensors that the forward saves for the backward
    saved_bytes: int
    # highest allocation during a step; None where the device does not tell
    peak_bytes: int | None
    sites: tuple[SiteRow, ...] = ()
    # what the report expected; None for the dense model, and where it expected nothing
    clock: Clock | None = None


def _median(variant: Variant, part: str) -> float:
    return float(statistics.median(getattr(step, part) for step in variant.steps))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


@dataclass(frozen=True)
class Measurement:
    """What `measure` found. `print` shows it; the first variant is the dense model."""

    model: str
    setting: Mapping[str, Any]
    variants: tuple[Variant, ...] = ()

    def speedups(self, variant: Variant, part: str = "backward") -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of dense over `variant`, round by round.

        `part` is "forward", "backward", "optimizer" or "total".
        """
        pairs = zip(self.variants[0].steps, variant.steps, strict=True)
        return _quartiles([getattr(dense, part) / getattr(own, part) for dense, own in pairs])

    def realised(self, variant: Variant) -> float | None:
        """Share of the FLOPs saved that the backward saves on the clock; None for the dense model."""
        if not variant.saving:
            return None
        return (1 - 1 / self.speedups(variant)[1]) / variant.saving

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, in seconds and bytes; ratios are dense over sparse."""
        return {
            "model": self.model,
            "setting": dict(self.setting),
            "variants": [
                {
                    "name": variant.name,
                    "saving": variant.saving,
                    "rewritten": variant.rewritten,
                    "keep": variant.keep,
                    "realised": self.realised(variant),
                    "median": {part: _median(variant, part) for part in _PARTS},
                    "speedup": {
                        part: dict(zip(("q1", "median", "q3"), self.speedups(variant, part), strict=True))
                        for part in ("backward", "total")
                    },
                    "steps": [step._asdict() for step in variant.steps],
                    "saved_bytes": variant.saved_bytes,
                    "peak_bytes": variant.peak_bytes,
                    "expected": None if variant.clock is None else variant.clock.to_dict(),
                    "sites": [site._asdict() for site in variant.sites],
                }
                for variant in self.variants
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return self.render("simple")

    def render(self, style: str) -> str:
        """The tables, in one of tabulate's formats: times, ratios, and layers where these were timed."""
        told = f"{self.model}: {', '.join(f'{key} {value}' for key, value in self.setting.items())}"
        # "simple" is for reading on a terminal of 80 columns
        told = textwrap.fill(told, 80) if style == "simple" else told
        parts = [told, self._times(style), self._ratios(style)]
        for variant in self.variants:
            if variant.sites:
                parts.append(f"{variant.name}, layer by layer (backward alone, random tensors)")
                parts.append(_site_table(variant, style))
        return "\n\n".join(parts)

    def _times(self, style: str) -> str:
        headers = ["median of", "FLOPs\nsaved"]
        headers += [f"{part}\nms" for part in ("forward", "backward", "optimizer", "step")]
        peaks = any(variant.peak_bytes is not None for variant in self.variants)
        headers += ["saved\nMiB", *(["peak\nMiB"] if peaks else [])]
        rows = []
        for variant in self.variants:
            row = [
                variant.name,
                f"{100 * variant.saving:.1f} %",
                *(f"{1000 * _median(variant, part):.1f}" for part in _PARTS),
                f"{variant.saved_bytes / 2**20:.0f}",
            ]
            rows.append([*row, f"{(variant.peak_bytes or 0) / 2**20:.0f}"] if peaks else row)
        return _tabulate(rows, headers, style)

    def _ratios(self, style: str) -> str:
        """Measured beside what the report expected: "2.2x / 1.5x" of the backward and the step."""
        headers = ("times as fast", "backward", "whole step", "expected", "realised")
        rows = []
        for variant in self.variants[1:]:
            realised, clock = self.realised(variant), variant.clock
            rows.append(
                (
                    variant.name,
                    _ratio(self.speedups(variant)),
                    _ratio(self.speedups(variant, "total")),
                    "-" if clock is None else f"{clock.backward:.1f}x / {clock.step:.1f}x",
                    "-" if realised is None else f"{100 * realised:.0f} %",
                )
            )
        return _tabulate(rows, headers, style)


def _tabulate(rows: Sequence[Sequence[str]], headers: Sequence[str], style: str) -> str:
    if style != "simple":
        headers = [header.replace("\n", " ") for header in headers]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def _ratio(quartiles: tuple[float, float, float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


def _site_table(variant: Variant, style: str) -> str:
    rows = [
        (
            site.name,
            f"{site.k}/{site.n}",
            f"{1000 * site.dense:.2f}",
            f"{1000 * site.sparse:.2f}",
            f"{site.dense / site.sparse:.2f}x",
            "slower" if site.sparse > site.dense else "",
        )
        for site in variant.sites
    ]
    headers = ("layer", "k/n", "dense ms", "sparse ms", "speed-up", "")
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)
