"""A budget: what a plan may cost, and plans beyond those that pay by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from fxprop.errors import ExamplesError, InputError
from fxprop.pipeline.recipe import recipe_of
from fxprop.policy.policy import Policy
from fxprop.training.candidates import LEAST_LEFT, StepClock
from fxprop.training.fidelity import names_of, overall, weight_of
from fxprop.training.gradients import Compared, Gradients, products_of
from fxprop.training.recommendation import Candidate

BudgetOf = Literal["time", "flops"]

# shares of the examples, and of the channels of all layers, until one meets the budget
_SHARES = (0.5, 0.25, 0.1, 0.05)


@dataclass(frozen=True)
class Budget:
    """The share of a dense step's time, forward to backward, or of the dense backward's FLOPs."""

    share: float
    of: BudgetOf = "time"

    def __post_init__(self) -> None:
        is_number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not (is_number and 0 < self.share <= 1):
            raise InputError(
                f"budget={self.share!r}: expected a number with 0 < budget <= 1, what a plan may cost of a "
                "dense step"
            )
        if self.of not in get_args(BudgetOf):
            raise InputError(f"budget_of={self.of!r}: expected one of {', '.join(get_args(BudgetOf))}")

    def spend(
        self,
        compared: Compared,
        dense: list[Gradients],
        clock: StepClock,
        tried: list[Candidate],
        best: Candidate,
    ) -> tuple[Candidate, float]:
        """The plan with most progress per second within the budget, and its cost; `best` if it is one.

        Where none of those `tried` is, others are tried, and listed with them, until one is. The cheapest
        if none is.
        """
        first = self._cost(compared, best)
        if first <= self.share:
            return best, first
        costs = self._costs(compared, tried)
        further = self._further(compared, dense, clock)
        while not (within := [of for of in costs if of[0] <= self.share]):
            more = next(further, None)
            if more is None:
                break
            tried += more
            costs += self._costs(compared, more)
        if within:
            cost, chosen = max(within, key=lambda of: of[1].worth)
        else:
            cost, chosen = min(costs, key=lambda of: of[0])
        return chosen, cost

    def _costs(self, compared: Compared, plans: list[Candidate]) -> list[tuple[float, Candidate]]:
        """Of those that may be taken."""
        return [(self._cost(compared, plan), plan) for plan in plans if _counts(plan)]

    def _cost(self, compared: Compared, candidate: Candidate) -> float:
        """Of a plan that was measured; dense = 1."""
        assert candidate.speed is not None
        cost = 1 / candidate.speed if self.of == "time" else _flops(compared, candidate)
        if cost is None:
            raise InputError(
                "budget_of='flops' needs FLOPs, which are counted with example_inputs only: transform "
                "with them, or take budget_of='time'"
            )
        return cost

    def _further(
        self, compared: Compared, dense: list[Gradients], clock: StepClock
    ) -> Iterator[list[Candidate]]:
        """Fewer and fewer of the examples, and of the channels of all layers."""
        when = "always" if self.of == "flops" else compared.dense.when
        examined = compared.recipe.examined
        joined = examined is not None and bool(examined.off)
        for share in _SHARES:
            found = []
            if not joined:
                plan = replace(compared.dense, examples=share)
                try:
                    found.append(_measured(f"{share:.0%} of the examples", plan, compared, dense, clock))
                except ExamplesError:
                    joined = True  # the row of "auto" says why
            plan = replace(compared.dense, keep=share, score="l2", when=when)
            found.append(
                _measured(f"{share:.0%} of the channels of all layers", plan, compared, dense, clock)
            )
            yield found


def _counts(candidate: Candidate) -> bool:
    """Whether it is a plan of its own that may be taken."""
    is_measured = candidate.speed is not None and candidate.stands_alone
    return is_measured and not (candidate.frozen and candidate.progress < LEAST_LEFT)


def _measured(
    name: str, plan: Policy, compared: Compared, dense: list[Gradients], clock: StepClock
) -> Candidate:
    progress = overall(products_of(dense, list(compared.gradients(plan)))).progress
    speed, least = clock.speed(plan)
    return Candidate(name, plan, speed=speed, progress=progress, least_speed=least)


def _flops(compared: Compared, candidate: Candidate) -> float | None:
    """Of the backward; layers without gradients cost nothing."""
    inner = compared.inner
    with compared.in_force(candidate.policy):
        report = recipe_of(inner).report(inner.training)
    totals = report.totals
    if totals.dense is None or totals.other is None:
        return None
    names = names_of(inner)
    executed = sum(
        layer.executed.total
        for layer in report.layers
        if layer.executed is not None and weight_of(inner, layer.name, names) not in candidate.frozen
    )
    whole = totals.dense + totals.other
    return (executed + (totals.other_executed or 0)) / whole if whole else 0.0
