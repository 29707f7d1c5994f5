"""How much the backward of a transformed module keeps: set anew, and read."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from fxprop import settings
from fxprop.compact.choice import Choice, Kept
from fxprop.compact.install import installed
from fxprop.errors import ExamplesError, PolicyError
from fxprop.pipeline.backend import Backend
from fxprop.pipeline.put_in_force import put_in_force, unwrap
from fxprop.pipeline.recipe import Recipe, attach, recipe_of
from fxprop.policy.files import PolicyLike, as_policy
from fxprop.report.report import Report


def set_keep(
    gm: nn.Module, keep: PolicyLike | None = None, *, examples: float | Literal["auto"] | None = None
) -> Report:
    """Let the backward pass of a transformed module keep another share from now on.

    >>> gm, report = fxprop.transform(model, 0.05, (x,))
    >>> fxprop.set_keep(gm, 1.0)                      # dense, as before the transform
    >>> fxprop.set_keep(gm, 0.2).totals.saving        # sparse again
    >>> fxprop.set_keep(gm, examples=0.5)             # of the mini-batch

    Args:
        gm: what `fxprop.transform` returned, also wrapped by torch.compile or DistributedDataParallel.
        keep: a number replaces the keep ratio of the policy in force wherever that policy is sparse;
            what its rules leave dense, and output layers, stay dense. A Policy, mapping or file takes
            that policy's place.
        examples: another share of the mini-batch, or "auto". Where the policy took some of it before,
            nothing is traced or compiled again. (Of what `fxprop.backend` returned: its `set_examples`.)

    Returns the report on the new plan. The graphs are made anew from those before the rewrite, without
    tracing, and those of the last few settings are remembered with their code. Parameters, and whatever an
    optimizer knows of them, stay as they are. Raises ModelError for another module, PolicyError as
    `transform` does, ExamplesError where the model's examples cannot be kept apart; then nothing has
    changed.
    """
    inner = unwrap(gm)
    recipe = recipe_of(inner)
    if keep is None and examples is None:
        raise PolicyError("set_keep: give keep, examples, or both")
    if examples is not None:
        settings.check("examples", examples, "set_keep")
        if examples != 1 and recipe.examined is not None and recipe.examined.off:
            raise ExamplesError(f"examples={examples!r} cannot be taken: {recipe.examined.off}")
    if keep is None:
        assert examples is not None
        return _set_examples(inner, recipe, examples)
    if isinstance(keep, int | float) and not isinstance(keep, bool):
        policy, base = recipe.policy.with_keep(keep), recipe.policy
    else:
        policy = base = as_policy(keep)
    if examples is not None:
        policy, base = replace(policy, examples=examples), replace(base, examples=examples)
    return put_in_force(inner, replace(recipe, policy=base), policy)


def _set_examples(gm: nn.Module, recipe: Recipe, share: float | Literal["auto"]) -> Report:
    base, policy = (replace(p, examples=share) for p in (recipe.policy, recipe.in_force))
    choice = chosen_in(gm)
    if choice is None or not recipe.in_force.takes_examples:
        return put_in_force(gm, replace(recipe, policy=base), policy)  # without chains of layers
    choice.share = share
    made = replace(recipe, policy=base, in_force=policy)
    attach(gm, made)
    return made.report(gm.training)


def kept_examples(target: nn.Module | Backend) -> Kept | None:
    """How many examples entered the last backward, and of how many; None if no part was chosen.

    >>> gm, _ = fxprop.transform(model, fxprop.Policy(examples=0.5), (x,))
    >>> gm(x).sum().backward()
    >>> kept = fxprop.kept_examples(gm)
    >>> kept.k, kept.n, kept.share
    """
    choice = target.choice if isinstance(target, Backend) else chosen_in(unwrap(target))
    return None if choice is None else choice.last


def chosen_in(gm: nn.Module) -> Choice | None:
    """What chooses examples for a transformed module; None where nothing does."""
    forward = installed(gm)
    return None if forward is None else forward.choice
