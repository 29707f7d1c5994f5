"""Recipe: what a transformed model was made by, kept with it so that another policy can be put in force."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fxprop.errors import ModelError
from fxprop.joint import chained
from fxprop.plan import Decision, Plan, Site, Sparsity
from fxprop.policy import Policy, Rule
from fxprop.report.flops import make_report
from fxprop.report.report import Report

# the attribute that marks a model that `transform` returned, and holds its Recipe
_ATTRIBUTE = "_fxprop_recipe"


@dataclass(frozen=True)
class Recipe:
    """Sites and decisions of every mode, and what a report says besides. Holds no tensor and no graph."""

    # what a keep ratio given later applies to
    policy: Policy
    # training mode -> plan; one alone where the mode makes no difference
    plans: Mapping[bool, Plan]
    # FLOPs of the whole dense backward; None where shapes are unknown
    backward_flops: Mapping[bool, int | None]
    model: str
    frontend: str
    note: str
    untraced: Mapping[str, str]
    # measured choices, by what was measured: (site's name, sparsity) -> why it is dense, or None
    measured: Mapping[tuple[str, Sparsity], str | None] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        """All sites, of all modes."""
        return [decision.site for plan in self.plans.values() for decision in plan.decisions]

    def planned(self, policy: Policy) -> dict[bool, Plan]:
        """The plans by another policy."""
        return {
            mode: self._by_measurement(policy.resolve([decision.site for decision in plan.decisions]))
            for mode, plan in self.plans.items()
        }

    def _by_measurement(self, plan: Plan) -> Plan:
        return Plan(chained([self._measured(decision) for decision in plan.decisions]))

    def _measured(self, decision: Decision) -> Decision:
        if decision.sparsity is None:
            return decision
        reason = self.measured.get((decision.site.name, decision.sparsity.alone))
        if reason is None:
            return decision
        return Decision(decision.site, "dense", reason, decided_by="tune")

    def mode(self, training: bool) -> bool:
        """The mode whose plan serves that one: itself, or the other where they share a graph."""
        return training if training in self.plans else not training

    def report(self, training: bool) -> Report:
        """The report on the present plan for that mode."""
        mode = self.mode(training)
        return make_report(
            self.plans[mode],
            self.backward_flops[mode],
            model=self.model,
            frontend=self.frontend,
            mode="train" if mode else "eval",
            note=self.note,
            untraced=self.untraced,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # predicates can rarely be pickled: rules that name each layer say the same
        if all(rule.where is None for rule in self.policy.rules):
            return dict(vars(self))
        return dict(vars(replace(self, policy=_by_name(self.policy, self.sites))))


def _by_name(policy: Policy, sites: list[Site]) -> Policy:
    """`policy` with a rule for each site in place of its own, so that it holds no function."""
    rules = []
    for site in {site.name: site for site in sites}.values():
        matching = next((rule for rule in policy.rules if rule.matches(site)), None)
        if matching is not None:
            bare = {"regex": None, "type": None, "position": None, "where": None}
            rules.append(replace(matching, name=glob.escape(site.name), **bare))
    return replace(policy, rules=tuple[Rule, ...](rules))


def attach(gm: nn.Module, recipe: Recipe) -> None:
    """Mark `gm` as transformed by `recipe`."""
    vars(gm)[_ATTRIBUTE] = recipe


def detach(gm: nn.Module) -> None:
    """Take the mark away."""
    del vars(gm)[_ATTRIBUTE]


def is_transformed(module: nn.Module) -> bool:
    """Whether `fxprop.transform` returned `module`."""
    return _ATTRIBUTE in vars(module)


def recipe_of(gm: nn.Module) -> Recipe:
    """The recipe of a module that `fxprop.transform` returned; ModelError for any other."""
    recipe = vars(gm).get(_ATTRIBUTE) if isinstance(gm, nn.Module) else None
    if not isinstance(recipe, Recipe):
        raise ModelError(f"got {type(gm).__name__}: expected the module that fxprop.transform returned")
    return recipe
