"""Plans made anew as training goes on: on which mini-batches, how often, and what is stored of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fxprop.errors import PolicyError
from fxprop.pipeline.put_in_force import put_in_force
from fxprop.pipeline.recipe import recipe_of
from fxprop.policy.files import from_dict, to_dict
from fxprop.training.budget import Budget, BudgetOf
from fxprop.training.candidates import Timings
from fxprop.training.recommend import find_plan
from fxprop.training.recommendation import Recommendation


@dataclass(frozen=True)
class Replan:
    """When and on what a `fxprop.KeepScheduler` asks `fxprop.recommend` for a plan.

    >>> loss = lambda gm, batch: F.cross_entropy(gm(batch[0]), batch[1])
    >>> scheduler = fxprop.KeepScheduler(gm, replan=schedules.Replan(loader, loss, every=300))

    Args:
        batches: mini-batches of the size to be trained with, which can be gone through again each time: a
            list, a DataLoader, or a function that returns some.
        loss: the loss of the module on a mini-batch, a tensor with one value.
        every: steps from one plan to the next.
        first: the step of the first plan; until then the policy in force stays.
        count: how many of the mini-batches are taken each time, the first ones; at least two.
        freeze, budget, budget_of, rounds: as `fxprop.recommend` takes them. What an earlier plan froze is
            asked again.

    The first plan takes about 5 * (rounds + 1) + count steps for each row of its table, later ones count
    for most: the speed of a plan is timed once, as it does not change with what is learnt (but that of
    "auto" is), and only its progress is measured again. Nothing is traced again. Raises PolicyError for
    values that it cannot have.
    """

    batches: Iterable[Any] | Callable[[], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    _: KW_ONLY
    every: int = 300
    first: int = 50
    count: int = 4
    freeze: bool = False
    budget: float | None = None
    budget_of: BudgetOf = "time"
    rounds: int = 3

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("first", 0), ("count", 2), ("rounds", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PolicyError(f"Replan: {name}={value!r}: expected an integer of at least {least}")
        if isinstance(self.batches, Iterator):
            raise PolicyError(
                f"Replan: batches is a {type(self.batches).__name__}, which can be gone through once only: "
                "give a list, a DataLoader, or a function that returns mini-batches"
            )
        if self.budget is not None:
            Budget(self.budget, self.budget_of)

    def is_due(self, step: int) -> bool:
        """Whether a plan is made at a step."""
        return step >= self.first and (step - self.first) % self.every == 0

    def draw(self) -> list[Any]:
        """The mini-batches; torch's random state stays, though a DataLoader draws its order by it."""
        state = torch.get_rng_state()
        try:
            return list(islice(self.batches() if callable(self.batches) else self.batches, self.count))
        finally:
            torch.set_rng_state(state)


class Planner:
    """Makes the plans for one module, and knows the last."""

    def __init__(self, gm: nn.Module, replan: Replan) -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise PolicyError(
                "replan: each of several processes would plan by its own clock. Call fxprop.recommend in "
                "one of them, and fxprop.set_keep with its policy in all"
            )
        self._gm, self._replan = gm, replan
        self._frozen: frozenset[str] = frozenset()
        self._has_planned = False
        self._timings = Timings()
        self.last: Recommendation | None = None

    def step(self, step: int) -> None:
        """Make a plan, if one is due."""
        of = self._replan
        if not of.is_due(step):
            return
        before = self._frozen
        self._freeze(frozenset())
        try:
            self.last = find_plan(
                *(self._gm, of.draw(), of.loss, self._timings),
                freeze=of.freeze,
                limit=None if of.budget is None else Budget(of.budget, of.budget_of),
                rounds=of.rounds,
            )
        except BaseException:
            self._freeze(before)
            raise
        self._frozen, self._has_planned = self.last.best.frozen, True

    def _freeze(self, names: frozenset[str]) -> None:
        """Let these parameters require no gradient, and those that a plan froze before one again."""
        for name, parameter in self._gm.named_parameters():
            if name in names or name in self._frozen:
                parameter.requires_grad_(name not in names)
        self._frozen = names

    def state_dict(self) -> dict[str, Any] | None:
        """The policy in force and what gets no gradient; None before the first plan."""
        if not self._has_planned:
            return None
        return {"policy": to_dict(recipe_of(self._gm).writable_policy), "frozen": sorted(self._frozen)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Put the plan of a checkpoint in force; nothing is measured."""
        if state is None:
            return
        policy = from_dict(state["policy"])
        put_in_force(self._gm, replace(recipe_of(self._gm), policy=policy), policy)
        self._freeze(frozenset(state["frozen"]))
        self._has_planned = True
