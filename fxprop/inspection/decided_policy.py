"""A policy with a rule for each layer that records what rules, cost model and timings decided."""

from __future__ import annotations

import glob
from typing import Any

from fxprop.pipeline.recipe import Recipe
from fxprop.plan.decisions import Decision
from fxprop.policy.policy import Policy, Rule
from fxprop.settings import OF_LAYERS


def make_decided_policy(recipe: Recipe) -> Policy:
    """A policy with one rule per layer, which gives the same rewrite of the model on any machine.

    >>> policy_files.to_toml(make_decided_policy(recipe_of(gm)))

    Skipped layers have no rule. Where train and eval mode have plans of their own, the first mode's holds
    for the layers that both have.
    """
    decisions: dict[str, Decision] = {}
    for plan in recipe.plans.values():
        for decision in plan.decisions:
            decisions.setdefault(decision.site.name, decision)
    decided = [decision for decision in decisions.values() if decision.status != "skipped"]
    # the rule for a weight's first use must not take its second ("fc#2")
    decided.sort(key=lambda decision: "#" not in decision.site.name)
    return Policy(rules=[_rule(decision) for decision in decided])


def _rule(decision: Decision) -> Rule:
    name, sparsity = glob.escape(decision.site.name), decision.sparsity
    if sparsity is None:
        return Rule(name=name, keep=1.0)
    given = {setting.name: getattr(sparsity, setting.name) for setting in OF_LAYERS}
    amount: dict[str, Any] = {"k": sparsity.k} if sparsity.share is None else {"keep": sparsity.share}
    if not sparsity.is_one or not sparsity.k:
        shares = [of.k / sparsity.n if of.share is None else of.share for of in sparsity.kept]
        amount = dict(zip(("keep_input", "keep_weight"), shares, strict=True))
    return Rule(name=name, regions=sparsity.region, when="always", **amount, **given)
