"""Which policy pays: progress on mini-batches against the time of steps, from dense upwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from fxprop.compact.install import uninstall
from fxprop.pipeline.put_in_force import put_in_force
from fxprop.pipeline.set_keep import chosen_in
from fxprop.progress import counting
from fxprop.training import candidates as plans
from fxprop.training.budget import Budget, BudgetOf
from fxprop.training.fidelity import overall
from fxprop.training.gradients import Compared, products_of
from fxprop.training.recommendation import Candidate, Recommendation, Spent

Batch = TypeVar("Batch")

_NO_PROGRESS = "the dense gradient makes no progress on another mini-batch either: give more of them"
# what a plan must promise, since progress is measured on a few mini-batches; one of channels more, since
# progress looks a step ahead: those that promised up to 1.1 have lost (examples/benchmarks/RESULTS.md)
_MARGIN, _MARGIN_OF_CHANNELS = 1.05, 1.25


def recommend(
    gm: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    freeze: bool = False,
    budget: float | None = None,
    budget_of: BudgetOf = "time",
    rounds: int = 3,
    progress: bool = False,
) -> Recommendation:
    """Put the policy in force that makes most progress per second here, or dense where none pays.

    >>> gm, _ = fxprop.transform(model, 1.0, (images,))
    >>> plan = fxprop.recommend(gm, loader, lambda gm, batch: loss(gm(batch[0]), batch[1]))
    >>> print(plan)

    Args:
        gm: what `fxprop.transform` returned, also wrapped as for `fxprop.fidelity`, in training mode; its
            policy does not matter.
        batches: mini-batches of the size to be trained with, at least two; of four or more, and of 256
            examples together, progress is known better.
        loss: the loss of the module on a mini-batch, a tensor with one value.
        freeze: for fine-tuning, once a new head has settled (some tens of steps of it alone): also try to
            train without the first parts of the model, whose parameters then require no gradient any more.
            What is left must make half of the progress.
        budget: what the plan may cost, 0 to 1: of a dense step's time, forward to backward, as measured
            here, or with budget_of="flops" of the dense backward's FLOPs. Of the plans within it the one
            with most progress per second is taken, even if dense makes more; where none is, fewer examples
            and fewer channels of all layers are tried until one is. What costs least is taken if none is,
            and the plan says so.
        rounds: timed steps of each plan, twice; dense steps take turns with them.
        progress: show a progress bar on standard error.

    A plan is worth its progress (`fxprop.fidelity`) times the speed of its steps, dense = 1; it has to be
    worth more at the lower quartile of its speed, too. Tried are:
        channels, by layers: those that save most seconds for the progress they are expected to lose come
            first; the loss is estimated as the part of the output gradient's energy that is dropped, times
            the progress made by the layer and all layers before it, where its errors go. At the least
            share also for the weights' gradients alone (keep_weight), whose errors go nowhere;
        examples="auto": unbiased, so its progress is that of all, and its share follows the spread of the
            examples' gradients; taken where it costs nothing as long as it keeps all, and saves time at
            its least share, both beside the best of the other plans, or else in place of one of channels;
        with `freeze`, the model without its first parts.
    What is worth no more than dense is not taken. Measured again in the course of training, by another
    call, nothing is traced again.

    Returns the plan, with what was tried and why. Parameters, gradients, buffers and the random state stay
    as they are. Raises what `fxprop.fidelity` raises; then nothing has changed.
    """
    limit = None if budget is None else Budget(budget, budget_of)
    return find_plan(
        gm, batches, loss, plans.Timings(), freeze=freeze, limit=limit, rounds=rounds, progress=progress
    )


def find_plan(
    gm: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    known: plans.Timings,
    *,
    freeze: bool = False,
    limit: Budget | None = None,
    rounds: int = 3,
    progress: bool = False,
) -> Recommendation:
    """As `recommend`; what is `known` is not timed again, and what is timed is added."""
    compared = Compared(gm, batches, loss)
    inner, before = compared.inner, compared.recipe
    had_choice = chosen_in(inner) is not None
    counted = counting("plans", progress)
    with compared.as_it_was(), counted as count, _uninstalled_on_error(inner):
        clock = plans.StepClock(compared, rounds, count, known)
        dense = list(compared.gradients(compared.dense))
        candidates = [Candidate("dense", compared.dense)]
        if overall(products_of(dense, dense)).products.dense_next > 0:
            candidates += plans.of_channels(compared, dense, clock)
            candidates += plans.of_prefixes(compared, dense, clock) if freeze else []
        else:
            candidates.append(Candidate("channels", compared.dense, speed=None, why=_NO_PROGRESS))
        best = max(candidates, key=lambda of: of.worth if _may_be_taken(of) else of.name == "dense")
        cost = 0.0
        if limit is not None:
            best, cost = limit.spend(compared, dense, clock, candidates, best)
        # which goes with any of them, but saves less where little is left of the backward
        examples = plans.of_examples(compared, clock, best)
        everything, of_channels = candidates[0], best is not candidates[0] and not best.frozen
        if limit is None and of_channels and not examples.accepted:
            # of two that do not pay together the one without a bias: plans of channels have lost to it
            alone = plans.of_examples(compared, clock, everything)
            if alone.accepted:
                best, examples = everything, alone
        candidates.append(examples)
    policy = best.policy
    takes_auto = examples.accepted and not policy.takes_examples
    if takes_auto and limit is not None and limit.of == "time":
        takes_auto = cost / (examples.speed or 1.0) <= limit.share
    if takes_auto:
        policy = replace(policy, examples="auto")
    report = put_in_force(inner, replace(before, policy=policy), policy)
    if not (policy.takes_examples or had_choice):
        uninstall(inner)
    for name, parameter in inner.named_parameters():
        if name in best.frozen:
            parameter.requires_grad_(False)
    pays = best.name == "dense" or _may_be_taken(best)
    spent = None if limit is None else Spent(limit.share, limit.of, cost, pays)
    return Recommendation(before.model, policy, best, tuple(candidates), report, spent)


@contextlib.contextmanager
def _uninstalled_on_error(gm: nn.Module) -> Iterator[None]:
    had_choice = chosen_in(gm) is not None
    try:
        yield
    except BaseException:
        if not had_choice:
            uninstall(gm)
        raise


def _may_be_taken(candidate: Candidate) -> bool:
    if candidate.frozen and candidate.progress < plans.LEAST_LEFT:
        return False
    margin = _MARGIN if candidate.frozen else _MARGIN_OF_CHANNELS
    return candidate.worth >= margin and candidate.least_speed * candidate.progress > 1
