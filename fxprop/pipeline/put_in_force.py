"""Another policy for a module that is already transformed, without tracing it again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from fxprop.errors import ModelError
from fxprop.graph.rewrite import rewrite_model
from fxprop.pipeline.arguments import check_needs_no_shapes
from fxprop.pipeline.recipe import Recipe, attach, is_transformed, recipe_of
from fxprop.policy.files import PolicyLike, as_policy
from fxprop.policy.policy import Policy
from fxprop.report.report import Report
from fxprop.tracing.module.traced_module import TracedModule


def set_keep(gm: nn.Module, keep: PolicyLike) -> Report:
    """Let the backward pass of a transformed module keep another share from now on.

    >>> gm, report = fxprop.transform(model, 0.05, (x,))
    >>> fxprop.set_keep(gm, 1.0)                      # dense, as before the transform
    >>> fxprop.set_keep(gm, 0.2).totals.saving        # sparse again

    Args:
        gm: what `fxprop.transform` returned, also wrapped by torch.compile or DistributedDataParallel.
        keep: a number replaces the keep ratio of the policy in force wherever that policy is sparse;
            what its rules leave dense, and output layers, stay dense. A Policy, mapping or file takes
            that policy's place.

    Returns the report on the new plan. Nothing is traced: the graphs are made anew from those before the
    rewrite, and those of the last few settings are remembered with their code. Parameters, and whatever an
    optimizer knows of them, stay as they are. Raises ModelError for another module, PolicyError as
    `transform` does; then nothing has changed.
    """
    inner = unwrap(gm)
    recipe = recipe_of(inner)
    if isinstance(keep, int | float) and not isinstance(keep, bool):
        return put_in_force(inner, recipe, recipe.policy.with_keep(keep))
    policy = as_policy(keep)
    return put_in_force(inner, replace(recipe, policy=policy), policy)


def put_in_force(gm: nn.Module, recipe: Recipe, policy: Policy) -> Report:
    """Rewrite `gm` by `policy`; `recipe.policy` stays what numbers given later apply to."""
    policy.check_all_match(recipe.sites)
    plans = recipe.make_plans(policy)
    if all(flops is None for flops in recipe.backward_flops.values()):
        check_needs_no_shapes(plans)
    pieces = {path: m for path, m in gm.named_modules() if isinstance(m, TracedModule)}
    rewrite_model(gm, pieces, plans)
    made = replace(recipe, plans=plans, in_force=policy)
    attach(gm, made)
    return made.report(gm.training)


def unwrap(gm: nn.Module) -> nn.Module:
    """The transformed module in `gm`: itself, or the one module that a wrapper holds."""
    return next((module for module in _inner(gm) if is_transformed(module)), gm)


def _inner(module: object) -> Iterator[nn.Module]:
    while isinstance(module, nn.Module):
        yield module
        if isinstance(module, nn.DataParallel):
            raise ModelError(
                "DataParallel copies the module for every call; use DistributedDataParallel instead"
            )
        # torch.compile's wrapper, and DistributedDataParallel's
        module = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
