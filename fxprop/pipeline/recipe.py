"""Recipe: what went into a transformed model, kept with it so that another policy can be put in force."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fxprop.errors import ModelError
from fxprop.plan.batch import take_share
from fxprop.plan.decisions import Decision, Plan, Sparsity, Timing
from fxprop.plan.sites import Site
from fxprop.policy.files import to_dict
from fxprop.policy.policy import Policy, Rule
from fxprop.report.flops import make_report
from fxprop.report.records import ExamplesKept
from fxprop.report.report import Report

# the attribute that marks a model that `transform` returned, and holds its Recipe
_ATTRIBUTE = "_fxprop_recipe"


@dataclass(frozen=True)
class Examined:
    """What is known of taking some of the examples."""

    # why it cannot be done; empty if it can, or is not known for want of example inputs
    off: str = ""
    # of the example inputs
    n: int | None = None
    # the backward in two parts, as code; empty where there is no cut
    backward: str = ""


@dataclass(frozen=True)
class Recipe:
    """Sites and decisions of every mode, and what a report says besides. Holds no tensor and no graph."""

    # what a keep ratio given later applies to
    policy: Policy
    # what the plans were made by
    in_force: Policy
    # training mode -> plan; one alone where the mode makes no difference
    plans: Mapping[bool, Plan]
    # FLOPs of the whole dense backward; None where shapes are unknown
    backward_flops: Mapping[bool, int | None]
    model: str
    frontend: str
    note: str
    untraced: Mapping[str, str]
    # whether the backward can take some of the examples; None if that was not asked
    examined: Examined | None = None
    # by what was measured: the site's name, and its sparsity
    measured: Mapping[tuple[str, Sparsity], Timing] = field(default_factory=dict)

    @property
    def backward(self) -> str:
        """The backward in two parts, as code; empty where there is none."""
        return "" if self.examined is None else self.examined.backward

    @property
    def sites(self) -> list[Site]:
        """All sites, of all modes."""
        return [decision.site for plan in self.plans.values() for decision in plan.decisions]

    def make_plans(self, policy: Policy) -> dict[bool, Plan]:
        """The plans by another policy."""
        return {
            mode: policy.with_chains([self._apply_timing(d) for d in policy.resolve(sites).decisions])
            for mode, sites in ((mode, [d.site for d in p.decisions]) for mode, p in self.plans.items())
        }

    def _apply_timing(self, decision: Decision) -> Decision:
        timing = self.timing(decision)
        stops = decision.sparsity is not None and decision.sparsity.stops
        if timing is None or timing.wins or stops:
            return decision
        return Decision(decision.site, "dense", str(timing), decided_by="tune")

    def timing(self, decision: Decision) -> Timing | None:
        """What was measured of a rewritten site; None if nothing was."""
        if decision.sparsity is None:
            return None
        return self.measured.get((decision.site.name, decision.sparsity.alone))

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
            policy=to_dict(self.writable_policy),
            examples=describe_examples(self.in_force, self.examined or Examined()),
            measured=self.timing,
        )

    @property
    def writable_policy(self) -> Policy:
        """The policy in force without functions: rules that have one name the layers instead."""
        return _writable(self.in_force, self.sites)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # predicates can rarely be pickled
        written = {name: _writable(getattr(self, name), self.sites) for name in ("policy", "in_force")}
        return {**vars(self), **written}


def _writable(policy: Policy, sites: list[Site]) -> Policy:
    """`policy` without functions: if its rules have any, rules for each site in place of its own."""
    if all(rule.where is None for rule in policy.rules):
        return policy
    rules = []
    for site in {site.name: site for site in sites}.values():
        matching = next((rule for rule in policy.rules if rule.matches(site)), None)
        if matching is not None:
            bare = {"regex": None, "type": None, "position": None, "where": None}
            rules.append(replace(matching, name=glob.escape(site.name), **bare))
    return replace(policy, rules=tuple[Rule, ...](rules))


def describe_examples(policy: Policy, known: Examined) -> ExamplesKept | None:
    """What a report says of the examples; None where the policy takes all."""
    if not policy.takes_examples:
        return None
    share = policy.examples_least if policy.examples == "auto" else policy.examples
    k = None if known.n is None else take_share(share, known.n)
    return ExamplesKept(policy.examples, policy.examples_select, known.n, k, known.off)


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
