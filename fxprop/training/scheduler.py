"""KeepScheduler: the keep ratio over training, with the interface of torch's LR schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from fxprop import settings
from fxprop.compact.choice import Choice
from fxprop.errors import PolicyError
from fxprop.pipeline.backend import Backend
from fxprop.pipeline.put_in_force import put_in_force, unwrap
from fxprop.pipeline.recipe import recipe_of
from fxprop.pipeline.set_keep import chosen_in, set_keep
from fxprop.policy.policy import Rule
from fxprop.training.recommendation import Recommendation
from fxprop.training.replan import Planner, Replan
from fxprop.training.schedules import Constant, Schedule

# a share of the examples, or "auto", by the step
ExamplesSchedule = Callable[[int], float | Literal["auto"]]


class KeepScheduler:
    """Sets the keep ratio of a transformed module as training goes on.

    >>> gm, report = fxprop.transform(model, 0.05, (x,))
    >>> scheduler = fxprop.KeepScheduler(gm, schedules.Warmup(100, schedules.Cosine(1.0, 0.05, steps=1000)))
    >>> for x, y in loader:
    ...     loss(gm(x), y).backward(); optimizer.step(); scheduler.step()

    Or the share of the examples, of a transformed module or of a backend:

    >>> scheduler = fxprop.KeepScheduler(gm, examples=schedules.Linear(1.0, 0.25, steps=1000))

    Or the shares for the gradients of inputs and weights, apart:

    >>> scheduler = fxprop.KeepScheduler(gm, schedules.Constant(0.5), keep_weight=schedules.Constant(0.25))

    Or what `fxprop.recommend` finds, asked again every few hundred steps:

    >>> scheduler = fxprop.KeepScheduler(gm, replan=schedules.Replan(loader, loss, every=300))

    Args:
        gm: what `fxprop.transform` returned, also wrapped by torch.compile or DistributedDataParallel; with
            `examples` alone also what `fxprop.backend` returned.
        schedule: from `fxprop.schedules`, or any function from a step to a keep ratio. As a number given
            to `fxprop.set_keep`, it applies wherever the policy is sparse; 1.0 is dense.
        rules: schedules of their own for some layers, by a glob on the layer's name: they come before the
            policy's rules, and are for both gradients.
        keep_input, keep_weight: schedules of the shares for the gradients of inputs and of weights, as
            `fxprop.set_keep` takes them; a function of your own may give 0.
        levels: how many different keep ratios a schedule may take between its lowest and its highest
            value (equal ratios apart; dense, where a warm-up or interleaving asks for it, comes on top),
            or those ratios themselves, or None for no bound. Under torch.compile each is compiled once.
        examples: a schedule for the share of the examples; another share needs no new graph. It may give
            "auto". With the policy's examples="auto" none is needed: the checkpoint has what it has
            learnt all the same.
        replan: in place of schedules, when to make a plan and on what; see `fxprop.schedules.Replan`. The
            state_dict has the last plan, which loading puts in force without measuring. Under torch.compile
            another plan is compiled anew.
        last_step: the step the schedule is at.

    As in torch's schedulers, making one sets the ratio of step `last_step + 1`. Raises PolicyError for
    values that are no keep ratio, and for a glob that matches no layer.
    """

    def __init__(
        self,
        gm: nn.Module | Backend,
        schedule: Schedule | None = None,
        *,
        rules: Mapping[str, Schedule] | None = None,
        keep_input: Schedule | None = None,
        keep_weight: Schedule | None = None,
        examples: ExamplesSchedule | None = None,
        replan: Replan | None = None,
        levels: int | Sequence[float] | None = 6,
        last_step: int = -1,
    ) -> None:
        self._target = gm
        self._gm = nn.Module() if isinstance(gm, Backend) else unwrap(gm)
        if not isinstance(gm, Backend):
            recipe_of(self._gm)
        elif schedule is not None or rules or keep_input is not None or keep_weight is not None:
            raise PolicyError("a backend has a schedule for examples only: its graphs are made once")
        of_gradients = {"keep_input": keep_input, "keep_weight": keep_weight}
        self._shares = {name: given for name, given in of_gradients.items() if given is not None}
        self._planner = self._planner_of(replan, [schedule, rules, examples, self._shares])
        if replan is None and schedule is None and (rules or (examples is None and not self._shares)):
            raise PolicyError("no schedule given: give one for the keep ratio, for examples, or both")
        self._schedules: dict[str | None, Schedule] = {} if schedule is None else {None: schedule}
        self._schedules.update(rules or {})
        self._examples = examples
        every = [*self._schedules.items(), *self._shares.items(), ("examples", examples or Constant(1.0))]
        for name, given in every:
            if not callable(given):
                raise PolicyError(
                    f"schedule{'' if name is None else f' of {name!r}'} is {given!r}: expected one of "
                    "fxprop.schedules, or a function from a step to a keep ratio"
                )
        self._levels = {
            name: _levels(given, levels)
            for name, given in [*self._schedules.items(), *self._shares.items()]
        }
        self.last_step = last_step
        self._last_keep: list[float] = []
        self._last_shares: dict[str, float] = {}
        self._last_examples: float | Literal["auto"] | None = None
        self.step()

    def _planner_of(self, replan: Replan | None, others: list[object]) -> Planner | None:
        if replan is None:
            return None
        if not isinstance(replan, Replan):
            raise PolicyError(f"replan={replan!r}: expected an fxprop.schedules.Replan")
        if isinstance(self._target, Backend):
            raise PolicyError(
                "replan: a backend's graphs are made once; give what fxprop.transform returned"
            )
        if any(others):
            raise PolicyError(
                "replan and a schedule both given: a plan says how much is kept, and of how many examples"
            )
        return Planner(self._gm, replan)

    def step(self) -> None:
        """Go to the next step, and set the keep ratios that belong to it, or make a plan if one is due."""
        self._set(self.last_step + 1)
        if self._planner is not None:
            self._planner.step(self.last_step)

    def get_last_keep(self) -> list[float]:
        """The keep ratios in force: the schedule's, then those of `rules` in their order."""
        return list(self._last_keep)

    def get_last_shares(self) -> dict[str, float]:
        """`keep_input` and `keep_weight` by their schedules, those that have one."""
        return dict(self._last_shares)

    def get_last_examples(self) -> float | Literal["auto"] | None:
        """The share of the examples by its schedule; None without one."""
        return self._last_examples

    def get_last_plan(self) -> Recommendation | None:
        """What `replan` found last, here; None before the first plan, and after loading a checkpoint."""
        return None if self._planner is None else self._planner.last

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; the schedules themselves are not in it."""
        choice = self._choice()
        return {
            "last_step": self.last_step,
            "last_keep": self.get_last_keep(),
            "last_shares": self.get_last_shares(),
            "last_examples": self._last_examples,
            "plan": None if self._planner is None else self._planner.state_dict(),
            "examples": None if choice is None else choice.state_dict(),
        }

    def _choice(self) -> Choice | None:
        return self._target.choice if isinstance(self._target, Backend) else chosen_in(self._gm)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with the keep ratios that were in force then.

        Raises PolicyError if the schedules give other ratios for that step than they gave then.
        """
        step, keep = state_dict["last_step"], list(state_dict["last_keep"])
        ratios = self._keep_at(step)
        if len(ratios) != len(keep) or not all(map(math.isclose, ratios, keep)):
            raise PolicyError(
                f"the checkpoint has keep ratios {keep} at step {step}; the schedules given here have "
                f"{ratios}. Make the scheduler with the schedules of the checkpoint."
            )
        shares, of_then = self._shares_at(step), state_dict.get("last_shares", {})
        if shares.keys() != of_then.keys() or not all(math.isclose(shares[n], of_then[n]) for n in shares):
            raise PolicyError(
                f"the checkpoint has {of_then} at step {step}; the schedules given here have {shares}. "
                "Make the scheduler with the schedules of the checkpoint."
            )
        share, then = self._examples and self._examples(step), state_dict.get("last_examples")
        if share != then:
            raise PolicyError(
                f"the checkpoint has examples={then!r} at step {step}; the schedule given here has "
                f"{share!r}. Make the scheduler with the schedule of the checkpoint."
            )
        self._set(step)
        if self._planner is not None:
            self._planner.load_state_dict(state_dict.get("plan"))
        choice, learnt = self._choice(), state_dict.get("examples")
        if choice is not None and learnt is not None:
            choice.load_state_dict(learnt)

    def _keep_at(self, step: int) -> list[float]:
        ratios = []
        for name, schedule in self._schedules.items():
            keep = schedule(step)
            settings.check("keep", keep, f"schedule at step {step}")
            ratios.append(_nearest(keep, self._levels[name]))
        return ratios

    def _shares_at(self, step: int) -> dict[str, float]:
        shares = {name: schedule(step) for name, schedule in self._shares.items()}
        for name, share in shares.items():
            settings.check(name, share, f"schedule at step {step}")
        return {name: _nearest(share, self._levels[name]) for name, share in shares.items()}

    def _set(self, step: int) -> None:
        keep, shares = self._keep_at(step), self._shares_at(step)
        share = None if self._examples is None else self._examples(step)
        if share is not None and share != self._last_examples:
            settings.check("examples", share, f"schedule of examples at step {step}")
            if isinstance(self._target, Backend):
                self._target.set_examples(share)
            else:
                set_keep(self._gm, examples=share)
        if (keep, shares) != (self._last_keep, self._last_shares):
            recipe = recipe_of(self._gm)
            policy = recipe.policy.with_keep(keep[0] if keep else None, **shares)
            names = [name for name in self._schedules if name is not None]
            own = [Rule(name=name, keep=value) for name, value in zip(names, keep[1:], strict=True)]
            put_in_force(self._gm, recipe, replace(policy, rules=(*own, *policy.rules)))
        self.last_step, self._last_keep, self._last_examples = step, keep, share
        self._last_shares = shares


def _levels(schedule: Schedule, levels: int | Sequence[float] | None) -> tuple[float, ...] | None:
    """The keep ratios that a schedule may take, besides dense; None for any."""
    if levels is None:
        return None
    if not isinstance(levels, int):
        for level in levels:
            settings.check("keep", level, "levels")
        if not levels:
            raise PolicyError("levels is empty: give the keep ratios, their number, or None for no bound")
        return tuple(levels)
    if isinstance(levels, bool) or levels < 1:
        raise PolicyError(f"levels={levels!r}: expected an integer of at least 1, ratios, or None")
    bounds = getattr(schedule, "range", None)
    if bounds is None:
        raise PolicyError(
            f"levels={levels} needs the range of the schedule, which is not known for a function of your "
            "own: give the ratios themselves, such as levels=(1.0, 0.3, 0.1), or levels=None"
        )
    low, high = bounds
    if levels == 1 or low == high:
        return (low,)
    ratio = (high / low) ** (1 / (levels - 1))
    return (*(low * ratio**number for number in range(levels - 1)), high)


def _nearest(keep: float, levels: tuple[float, ...] | None) -> float:
    if levels is None or keep in (0, 1):
        return keep
    return min(levels, key=lambda level: abs(math.log(level / keep)))
