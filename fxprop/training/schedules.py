"""Schedules: functions from a step to a keep ratio.

A step is whatever the scheduler's `step()` counts, a batch or an epoch. Any function from int to float
will do; those here can be compared, printed and stored, and know their range, which a scheduler divides
into levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fxprop import settings
from fxprop.errors import PolicyError
from fxprop.training.replan import Replan as Replan


class Schedule(Protocol):
    """keep ratio = schedule(step), for steps from 0."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same keep ratio always.

    >>> Constant(0.05)(1000)
    0.05
    """

    keep: float

    def __post_init__(self) -> None:
        settings.check("keep", self.keep, "Constant")

    def __call__(self, step: int) -> float:
        return self.keep

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest keep ratio."""
        return self.keep, self.keep


@dataclass(frozen=True)
class _FromTo:
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        settings.check("keep", self.start, f"{name}: start")
        settings.check("keep", self.end, f"{name}: end")
        _check_count(self.steps, f"{name}: steps")

    def _done(self, step: int) -> float:
        return min(max(step, 0) / self.steps, 1.0)

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest keep ratio."""
        return min(self.start, self.end), max(self.start, self.end)


class Linear(_FromTo):
    """From `start` to `end` in equal parts over `steps`, then `end`.

    >>> [round(Linear(1.0, 0.2, steps=4)(step), 2) for step in range(6)]
    [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    """

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self._done(step)


class Cosine(_FromTo):
    """From `start` to `end` along half a cosine over `steps`, then `end`.

    >>> [round(Cosine(1.0, 0.2, steps=4)(step), 2) for step in range(5)]
    [1.0, 0.88, 0.6, 0.32, 0.2]
    """

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * self._done(step))) / 2


@dataclass(frozen=True)
class Step:
    """`start`, multiplied by `gamma` after every `every` steps, never below `lowest`.

    >>> [Step(0.8, gamma=0.5, every=2, lowest=0.2)(step) for step in range(6)]
    [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    """

    start: float
    gamma: float
    every: int
    lowest: float

    def __post_init__(self) -> None:
        settings.check("keep", self.start, "Step: start")
        settings.check("keep", self.lowest, "Step: lowest")
        _check_count(self.every, "Step: every")
        if not 0 < self.gamma < 1:
            raise PolicyError(f"Step: gamma={self.gamma!r}: expected a number between 0 and 1")
        if self.lowest > self.start:
            raise PolicyError(f"Step: lowest={self.lowest!r} is above start={self.start!r}")

    def __call__(self, step: int) -> float:
        return float(max(self.lowest, self.start * self.gamma ** (max(step, 0) // self.every)))

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest keep ratio."""
        return self.lowest, self.start


@dataclass(frozen=True)
class Warmup:
    """Dense for the first `steps`, then another schedule from its own step 0.

    >>> [Warmup(2, Constant(0.1))(step) for step in range(4)]
    [1.0, 1.0, 0.1, 0.1]
    """

    steps: int
    then: Schedule

    def __post_init__(self) -> None:
        _check_count(self.steps, "Warmup: steps")

    def __call__(self, step: int) -> float:
        return 1.0 if step < self.steps else self.then(step - self.steps)

    @property
    def range(self) -> tuple[float, float] | None:
        """Lowest and highest keep ratio of what follows; None if that does not know."""
        return getattr(self.then, "range", None)


@dataclass(frozen=True)
class Interleave:
    """Dense in every `every`-th step (the first of them), another schedule in the steps between.

    >>> [Interleave(Constant(0.1), every=3)(step) for step in range(5)]
    [1.0, 0.1, 0.1, 1.0, 0.1]

    The other schedule sees every step, also the dense ones. Source: ssProp's dense epochs.
    """

    schedule: Schedule
    every: int

    def __post_init__(self) -> None:
        _check_count(self.every, "Interleave: every")

    def __call__(self, step: int) -> float:
        return 1.0 if step % self.every == 0 else self.schedule(step)

    @property
    def range(self) -> tuple[float, float] | None:
        """Lowest and highest keep ratio of the other schedule; None if that does not know."""
        return getattr(self.schedule, "range", None)


@dataclass(frozen=True)
class Dense:
    """Dense in the first and the last part of `steps`, another schedule between, from its own step 0.

    >>> [Dense(Constant(0.1), steps=5, first=0.4, last=0.2)(step) for step in range(6)]
    [1.0, 1.0, 0.1, 0.1, 1.0, 1.0]

    Args:
        schedule: what lies between; for examples also `Auto()`.
        steps: of the whole training.
        first, last: shares of `steps`, together at most 1. What is beyond `steps` is as its end.
    """

    schedule: Callable[[int], Any]
    steps: int
    first: float = 0.2
    last: float = 0.1

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise PolicyError(
                f"Dense: schedule={self.schedule!r}: expected a schedule, or a function of the step"
            )
        _check_count(self.steps, "Dense: steps")
        for name in ("first", "last"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise PolicyError(f"Dense: {name}={share!r}: expected a number from 0 to 1")
        if self.first + self.last > 1:
            raise PolicyError(f"Dense: first={self.first!r} and last={self.last!r} are more than all steps")

    def __call__(self, step: int) -> Any:
        start, end = round(self.first * self.steps), self.steps - round(self.last * self.steps)
        return 1.0 if step < start or (self.last and step >= end) else self.schedule(step - start)

    @property
    def range(self) -> tuple[float, float] | None:
        """Lowest and highest keep ratio of what lies between; None if that does not know."""
        return getattr(self.schedule, "range", None)


@dataclass(frozen=True)
class Auto:
    """Of examples: the share follows the spread of their gradient norms, as with `examples="auto"`.

    >>> Dense(Auto(), steps=10, first=0.2, last=0.0)(1), Auto()(5)
    (1.0, 'auto')
    """

    def __call__(self, step: int) -> Literal["auto"]:
        return "auto"


def _check_count(count: int, where: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise PolicyError(f"{where}={count!r}: expected an integer of at least 1")
