"""How much the backward of a transformed module keeps: set anew, and read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

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
    gm: nn.Module,
    keep: PolicyLike | None = None,
    *,
    keep_input: float | None = None,
    keep_weight: float | None = None,
    examples: float | Literal["auto"] | None = None,
) -> Report:
    """Let the backward pass of a transformed module keep another share from now on.

    >>> gm, report = fxprop.transform(model, 0.05, (x,))
    >>> fxprop.set_keep(gm, 1.0)                      # dense, as before the transform
    >>> fxprop.set_keep(gm, 0.2).totals.saving        # sparse again
    >>> fxprop.set_keep(gm, 0.2, keep_weight=0.5)     # more for the weights' gradients
    >>> fxprop.set_keep(gm, examples=0.5)             # of the mini-batch

    Args:
        gm: what `fxprop.transform` returned, also wrapped by torch.compile or DistributedDataParallel.
        keep: a number replaces the keep ratio of the policy in force wherever that policy is sparse,
            and its shares for single gradients; what its rules leave dense, and output layers, stay
            dense. A Policy, mapping or file takes that policy's place.
        keep_input, keep_weight: shares for the gradients of the inputs and of the weights, 0 to 1, wherever
            the policy is sparse. What is not given is `keep`, or without it what the policy says.
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
    shares: dict[str, Any] = {"keep_input": keep_input, "keep_weight": keep_weight}
    has_shares = keep_input is not None or keep_weight is not None
    if keep is None and examples is None and not has_shares:
        raise PolicyError("set_keep: give keep, keep_input, keep_weight or examples")
    if examples is not None:
        settings.check("examples", examples, "set_keep")
        if examples != 1 and recipe.examined is not None and recipe.examined.off:
            raise ExamplesError(f"examples={examples!r} cannot be taken: {recipe.examined.off}")
    if keep is None and not has_shares:
        assert examples is not None
        return _set_examples(inner, recipe, examples)
    if keep is None or (isinstance(keep, int | float) and not isinstance(keep, bool)):
        policy, base = recipe.policy.with_keep(keep, **shares), recipe.policy
    else:
        policy = base = as_policy(keep)
        policy = policy.with_keep(**shares) if has_shares else policy
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
