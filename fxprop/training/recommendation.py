"""What `fxprop.recommend` tried and chose, as a table."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fxprop.policy.files import to_dict
from fxprop.policy.policy import Policy
from fxprop.report.report import Report


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried."""

    name: str
    policy: Policy
    # parameters that get no gradient
    frozen: frozenset[str] = frozenset()
    # of a step, dense = 1; None where it was not measured: see `why`
    speed: float | None = 1.0
    # of a step, on another mini-batch; dense = 1
    progress: float = 1.0
    why: str = ""
    # beside the plan that is chosen
    accepted: bool = False
    # lower quartile of the speed over the rounds
    least_speed: float = 1.0
    # whether it is a plan without another; "auto" goes with any
    stands_alone: bool = True

    @property
    def worth(self) -> float:
        """Progress per second, dense = 1; 0 where nothing was measured."""
        return 0.0 if self.speed is None else self.speed * self.progress

    def to_dict(self) -> dict[str, Any]:
        """The numbers, and the reason."""
        numbers = {"speed": self.speed, "progress": self.progress, "worth": self.worth}
        return {"name": self.name, **numbers, "why": self.why, "frozen": sorted(self.frozen)}


@dataclass(frozen=True)
class Spent:
    """A budget, and the cost of the plan that was chosen by it, of a dense step."""

    share: float
    # "time" or "flops"
    of: str
    cost: float
    # whether the plan is worth more than dense besides
    pays: bool

    def __str__(self) -> str:
        what = "dense step's time" if self.of == "time" else "dense backward's FLOPs"
        text = f"Budget: {self.share:.2f} of a {what}; the plan costs {self.cost:.2f}"
        if self.cost > self.share:
            return f"{text}, and nothing that was tried costs less."
        return f"{text}." if self.pays else f"{text}. Without the budget it would not be taken."


@dataclass(frozen=True)
class Recommendation:
    """What `fxprop.recommend` put in force; `print` shows what was tried, and why it was taken or not."""

    model: str
    # in force now
    policy: Policy
    # what it rests on; "dense" where no plan of layers pays
    best: Candidate
    tried: tuple[Candidate, ...]
    # on the policy
    report: Report
    # what the plan might cost, and what it does; None without a budget
    budget: Spent | None = None

    @property
    def is_dense(self) -> bool:
        """Whether nothing pays."""
        return self.best.name == "dense" and not self.policy.takes_examples

    def to_dict(self) -> dict[str, Any]:
        """The policy and all that was tried."""
        return {
            "model": self.model,
            "policy": to_dict(self.policy),
            "frozen": sorted(self.best.frozen),
            "budget": None if self.budget is None else vars(self.budget),
            "tried": [candidate.to_dict() for candidate in self.tried],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return self.render("simple")

    def render(self, style: str, judged: bool = True) -> str:
        """The table, in one of tabulate's formats; not `judged`, without progress."""
        if not judged:
            return self._speeds(style)
        headers = ("plan", "speed of\na step", "progress", "per\nsecond", "")
        rows = [self._row(candidate) for candidate in self.tried]
        chosen = [c.name for c in self.tried if self._takes(c)]
        lines = (
            f"{self.model}: {' with '.join(chosen)}",
            "",
            _tabulate(rows, headers, style),
            "",
            "Dense = 1. progress: of a small step along the plan's gradient, on another",
            "mini-batch. The same progress takes 1 / (progress per second) of dense's time.",
            *([] if self.budget is None else [str(self.budget)]),
        )
        return "\n".join(lines)

    def _speeds(self, style: str) -> str:
        headers = ("plan", "speed of\na step", "pays where\nprogress is above", "")
        rows = [
            [c.name, f"{c.speed:.2f}x", f"{1 / c.speed:.2f}", c.why]
            if c.speed
            else [c.name, "-", "-", c.why]
            for c in self.tried
        ]
        return "\n".join(
            (
                f"{self.model}: speeds alone, on random numbers; --batches measures progress",
                "",
                _tabulate(rows, headers, style),
                *([] if self.budget is None else ["", str(self.budget)]),
            )
        )

    def _takes(self, candidate: Candidate) -> bool:
        if candidate is self.best and candidate.name == "dense":
            return not self.policy.takes_examples
        return candidate is self.best or candidate.accepted

    def _row(self, candidate: Candidate) -> list[str]:
        numbers = ["-"] * 3
        if candidate.speed is not None:
            numbers = [f"{candidate.speed:.2f}x", f"{candidate.progress:.2f}", f"{candidate.worth:.2f}"]
        taken = "taken" if self._takes(candidate) else ""
        words = ": ".join(part for part in (taken, candidate.why) if part)
        return [candidate.name, *numbers, words]


def _tabulate(rows: Sequence[Sequence[str]], headers: Sequence[str], style: str) -> str:
    """Plans, each with the reason behind it; "simple", for a terminal of 80 columns, has these below."""
    if style != "simple":
        headers = [header.replace("\n", " ") for header in headers]
        return tabulate(rows, headers, tablefmt=style, disable_numparse=True)
    table = tabulate(
        [row[:-1] for row in rows],
        headers[:-1],
        tablefmt=style,
        disable_numparse=True,
        maxcolwidths=[42, *[None] * (len(headers) - 2)],
    )
    words = [
        # paths stay whole
        textwrap.fill(f"{name}: {why}", 80, subsequent_indent="  ", break_long_words=False)
        for name, *_, why in rows
        if why
    ]
    return "\n".join((table, *(["", *words] if words else [])))
