"""Plans to choose from, each with the speed of its steps and the progress that they make."""

from __future__ import annotations

import contextlib
import glob
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxprop.errors import ExamplesError
from fxprop.inspection.decided_policy import make_decided_policy
from fxprop.pipeline.recipe import recipe_of
from fxprop.pipeline.set_keep import chosen_in
from fxprop.plan.sites import Site
from fxprop.policy.policy import Policy, Rule
from fxprop.pytree import tree_leaves
from fxprop.timing.layer_times import SiteTimes
from fxprop.timing.tune import site_times
from fxprop.training.fidelity import energies_of, names_of, overall, weight_of
from fxprop.training.gradients import Compared, Gradients, products_of
from fxprop.training.recommendation import Candidate

# kept shares of channels, and of the layers that save time those that are tried together, the best first
_SHARES = (0.5, 0.25)
_PARTS = (0.25, 0.5, 1.0)
# what "auto" may cost while it still keeps all, and what it has to save where it keeps its least: its
# gradients vary about twice as much, as those of half as large mini-batches
_AUTO_COSTS, _AUTO_SAVES = 0.93, 1.3
# of the progress, what a model without its first parts must still make: more than a step ahead is not seen
LEAST_LEFT = 0.5


class Speed(NamedTuple):
    """How many times as fast as dense: by the medians, and the lower quartile of the rounds' ratios."""

    median: float
    least: float


@dataclass
class Timings:
    """What was timed of one model, which does not change as it learns."""

    # steps, by policy and what gets no gradient
    steps: dict[tuple[Policy, frozenset[str]], Speed] = field(default_factory=dict)
    layers: dict[Policy, list[tuple[Site, SiteTimes]]] = field(default_factory=dict)


class StepClock:
    """Times of steps, forward to backward, in turns with dense ones; what is known is not timed again."""

    def __init__(
        self, compared: Compared, rounds: int, count: Callable[[], object], known: Timings
    ) -> None:
        self._compared, self._rounds, self._count, self._known = compared, rounds, count, known

    def speed(self, policy: Policy, frozen: frozenset[str] = frozenset()) -> Speed:
        """How many times as fast as a dense step."""
        known = self._known.steps.get((policy, frozen))
        # the share that "auto" keeps, and with it its speed, changes with what the model has learnt
        if known is None or policy.examples == "auto":
            known = self._known.steps[policy, frozen] = self._measure(policy, frozen)
        self._count()
        return known

    def layers(self, policy: Policy) -> list[tuple[Site, SiteTimes]]:
        """The times of the layers that a policy, which is in force, rewrites."""
        if policy not in self._known.layers:
            timed = site_times(self._compared.inner, None, 3)
            self._known.layers[policy] = [(site, times) for site, _, times in timed]
        return self._known.layers[policy]

    def _measure(self, policy: Policy, frozen: frozenset[str]) -> Speed:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(2):
            for of, (policy_now, without) in zip(
                times, ((self._compared.dense, frozenset[str]()), (policy, frozen)), strict=True
            ):
                with self._compared.in_force(policy_now), _without(self._compared.inner, without):
                    of += [self._step(number) for number in range(self._rounds + 1)][1:]
        ratios = [dense / own for dense, own in zip(*times, strict=True)]
        least = statistics.quantiles(ratios, n=4)[0]
        return Speed(statistics.median(times[0]) / statistics.median(times[1]), least)

    def _step(self, number: int) -> float:
        parameters = [p for p in self._compared.inner.parameters() if p.requires_grad]
        batch = self._compared.batches[number % len(self._compared.batches)]
        start = _now(parameters[0].device)
        torch.autograd.grad(self._compared.loss_of(batch), parameters, allow_unused=True)
        return _now(parameters[0].device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _without(gm: nn.Module, frozen: frozenset[str]) -> Iterator[None]:
    chosen = [p for name, p in gm.named_parameters() if name in frozen and p.requires_grad]
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)


def of_channels(compared: Compared, dense: list[Gradients], clock: StepClock) -> list[Candidate]:
    """Plans of channels: more and more layers at the same share; the least also for the weights alone."""
    found = []
    for share in _SHARES:
        policy = replace(compared.dense, keep=share, score="l2")
        with compared.in_force(policy):
            energies = energies_of(compared.inner, recipe_of(compared.inner), compared.gradients)
        found += _of_layers(compared, dense, clock, policy, energies)
        if share == min(_SHARES):
            # chosen alike, so that the same energy is kept
            weights = replace(policy, keep=1.0, keep_weight=share)
            found += _of_layers(compared, dense, clock, weights, energies)
    return found


def _of_layers(
    compared: Compared,
    dense: list[Gradients],
    clock: StepClock,
    policy: Policy,
    energies: dict[str, tuple[float, float]],
) -> list[Candidate]:
    """Plans with more and more of the layers for which `policy` saves time."""
    alone = policy.keep_weight is not None
    share, of = (policy.keep_weight, ", for the weights alone") if alone else (policy.keep, "")
    with compared.in_force(policy):
        timed = clock.layers(policy)
        decided = {rule.name: rule for rule in make_decided_policy(recipe_of(compared.inner)).rules}
    ordered, found = _by_gain(compared, dense, energies, timed, stays=alone), []
    if not ordered:
        what = f"{share:.0%} of the channels{of}"
        return [Candidate(what, compared.dense, speed=None, why="no layer is faster")]
    for number in sorted({max(1, round(part * len(ordered))) for part in _PARTS}):
        names = [site.name for site in ordered[:number]]
        rules = [decided[glob.escape(name)] for name in names]
        plan = replace(compared.dense, rules=(*rules, Rule(regex=".*", keep=1.0)))
        progress = overall(products_of(dense, list(compared.gradients(plan)))).progress
        what = f"{share:.0%} of the channels of {number} of {len(ordered)} layers that save time{of}"
        speed, least = clock.speed(plan)
        found.append(Candidate(what, plan, speed=speed, progress=progress, least_speed=least))
    return found


def _by_gain(
    compared: Compared,
    dense: list[Gradients],
    energies: dict[str, tuple[float, float]],
    timed: Sequence[tuple[Site, SiteTimes]],
    *,
    stays: bool,
) -> list[Site]:
    """The layers that save time, by seconds saved for the progress that is expected to be lost.

    `stays`: what is lost in a layer goes no further.
    """
    names = names_of(compared.inner)
    products = products_of(dense, dense)
    total = overall(products).products.dense_next
    own = [p.dense_next for p in products.values()]
    # of each parameter, and of those before it, where its errors go
    made = dict(zip(products, own if stays else accumulate(own), strict=True))
    gains: list[tuple[float, Site]] = []
    for site, times in timed:
        name = weight_of(compared.inner, site.name, names)
        saved = times.dense - times.sparse
        if saved <= 0 or name not in energies or name not in made:
            continue
        of_all, of_kept = energies[name]
        dropped = 1 - of_kept / of_all if of_all else 0.0
        lost = dropped * max(made[name] / total, 0.0)
        gains.append((saved / max(lost, 1e-6), site))
    return [site for _, site in sorted(gains, key=lambda gain: -gain[0])]


def of_examples(compared: Compared, clock: StepClock, best: Candidate) -> Candidate:
    """Part of the mini-batch, beside the plan that was found best: its speed is against that one's."""
    policy = replace(best.policy, examples="auto")
    name = 'examples="auto"'
    examined = compared.recipe.examined
    if examined is not None and examined.off:
        return Candidate(name, policy, speed=None, why=examined.off)
    try:
        with compared.in_force(policy):
            for _ in compared.gradients(policy):
                pass
            choice = chosen_in(compared.inner)
            assert choice is not None
            count = len(next(iter(_tensors(compared.batches[0]))))
            share = choice.count(count) / count
        alone = best.speed or 1.0
        now = clock.speed(policy, best.frozen).median / alone
        least_kept = replace(policy, examples=policy.examples_least)
        least = clock.speed(least_kept, best.frozen).median / alone
    except ExamplesError as error:
        return Candidate(name, policy, speed=None, why=str(error))
    accepted = now >= _AUTO_COSTS and least >= _AUTO_SAVES
    why = f"keeps {share:.0%} now; at its least share, {policy.examples_least:.0%}, {least:.2f}x as fast"
    if best.name != "dense":
        why = f"beside the plan that is taken (1.00x here): {why}"
    return Candidate(
        name, compared.dense, speed=now, progress=1.0, why=why, accepted=accepted, stands_alone=False
    )


def of_prefixes(compared: Compared, dense: list[Gradients], clock: StepClock) -> list[Candidate]:
    """The model without gradients for its first parts: children of the first module that has several."""
    names = list(dense[0])
    module, path = compared.inner, ""
    while (
        len(children := [(n, m) for n, m in module.named_children() if any(True for _ in m.parameters())])
        == 1
    ):
        module, path = children[0][1], f"{path}{children[0][0]}."
    found, products = [], products_of(dense, dense)
    total = overall(products).products.dense_next
    for number in range(1, len(children)):
        parts = tuple(f"{path}{name}." for name, _ in children[:number])
        frozen = frozenset(name for name in names if name.startswith(parts))
        rest = sum(p.dense_next for name, p in products.items() if name not in frozen)
        what = f"without the gradients of {', '.join(part.removesuffix('.') for part in parts)}"
        speed, least = clock.speed(compared.dense, frozen)
        progress = rest / total
        why = "" if progress >= LEAST_LEFT else "most of the progress is made there"
        found.append(Candidate(what, compared.dense, frozen, speed, progress, why, least_speed=least))
    return found


def _tensors(batch: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
