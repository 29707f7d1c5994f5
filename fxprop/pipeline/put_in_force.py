"""Another policy for a module that is already transformed, without tracing it again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from fxprop.compact.choice import Choice
from fxprop.compact.install import CompactForward, install, reinstall, uninstall
from fxprop.errors import ModelError
from fxprop.graph.rewrite import rewrite_model
from fxprop.pipeline.arguments import check_needs_no_shapes
from fxprop.pipeline.recipe import Recipe, attach, is_transformed
from fxprop.policy.policy import Policy
from fxprop.report.report import Report
from fxprop.tracing.module.traced_module import TracedModule


def put_in_force(gm: nn.Module, recipe: Recipe, policy: Policy) -> Report:
    """Rewrite `gm` by `policy`; `recipe.policy` stays what numbers given later apply to."""
    policy.check_all_match(recipe.sites)
    plans = recipe.make_plans(policy)
    if all(flops is None for flops in recipe.backward_flops.values()):
        check_needs_no_shapes(plans)
    pieces = {path: m for path, m in gm.named_modules() if isinstance(m, TracedModule)}
    forward = uninstall(gm)
    try:
        rewrite_model(gm, pieces, plans)
    except BaseException:
        if forward is not None:
            reinstall(gm, forward)
        raise
    made = replace(recipe, plans=plans, in_force=policy)
    attach(gm, made)
    take_examples(gm, made, forward)
    return made.report(gm.training)


def take_examples(gm: nn.Module, recipe: Recipe, before: CompactForward | None = None) -> None:
    """Let the backward take the examples that the policy in force says.

    `before` is what did so until now: what it has learnt and captured stays.
    """
    policy = recipe.in_force
    off = recipe.examined is not None and bool(recipe.examined.off)
    if before is not None:
        reinstall(gm, before)
    elif policy.takes_examples and not off:
        before = install(gm, Choice(policy.examples))
    if before is not None:
        adapt(before.choice, policy)
        before.version = tuple(
            (d.site.name, d.sparsity) for plan in recipe.plans.values() for d in plan.rewritten
        )


def adapt(choice: Choice, policy: Policy) -> Choice:
    """`choice`, by the settings of `policy`; what it has learnt stays."""
    choice.share, choice.select = policy.examples, policy.examples_select
    choice.least, choice.factor = policy.examples_least, policy.examples_factor
    return choice


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
