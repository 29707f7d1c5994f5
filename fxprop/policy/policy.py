"""Policies: which layers keep how much. Rules and defaults in, a Plan out.

A policy never sees a graph: `Policy.resolve` takes `Site` records and returns one `Decision` for each.
Policy files are read and written in `files.py`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fxprop import settings
from fxprop.errors import OpError, PolicyError
from fxprop.ops.entries import available
from fxprop.ops.scores import FROM_SUMS, get_score
from fxprop.ops.selections import SELECTIONS
from fxprop.plan.decisions import Decision, Kept, Plan, Sparsity
from fxprop.plan.sites import Site
from fxprop.policy import cost_model as cost
from fxprop.policy.amounts import asked_of, given_by, kept_of
from fxprop.policy.between_layers import find_unreached, form_chains, settle_shared_code

Position = Literal["first", "output"]
POSITIONS: tuple[Position, ...] = ("first", "output")

CONDITIONS = ("name", "regex", "type", "position", "where")


@dataclass(frozen=True, kw_only=True)
class Rule(settings.RuleSettings):
    """One line of a policy: conditions that must all hold, and what they set.

    >>> fxprop.Rule(name="layer4.*", keep=0.2)
    >>> fxprop.Rule(type="Linear", position="first", keep=1.0)          # leave dense
    >>> fxprop.Rule(where=lambda site: site.groups > 1, select="element")

    Conditions:
        name: glob on the site's name; `fc` also matches the second use `fc#2`.
        regex: regular expression that must match the whole name.
        type: the module's class name or that of a base class ("Linear"), or the operator ("conv2d").
        position: "first" (no other site upstream) or "output" (none downstream).
        where: a function of the Site; cannot be written to a file.

    Settings: see `Policy`. What a rule leaves out comes from the policy. PolicyError for bad values.
    """

    name: str | None = None
    regex: str | None = None
    type: str | None = None
    position: Position | None = None
    where: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, condition) is None for condition in CONDITIONS):
            raise PolicyError(
                f"a rule needs a condition: give at least one of {', '.join(CONDITIONS)} "
                "(what applies to every layer belongs in the policy itself)"
            )
        for condition in ("name", "regex", "type"):
            value = getattr(self, condition)
            if value is not None and not isinstance(value, str):
                raise PolicyError(f"rule: {condition}={value!r}: expected a string")
        if self.position is not None and self.position not in POSITIONS:
            raise PolicyError(f"rule: position={self.position!r}: expected 'first' or 'output'")
        if self.where is not None and not callable(self.where):
            raise PolicyError(f"rule: where={self.where!r}: expected a function of the site")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise PolicyError(
                    f"rule: regex={self.regex!r} is not a regular expression: {error}"
                ) from error
        _check(self, "rule")

    def matches(self, site: Site) -> bool:
        """Whether all conditions hold for `site`."""
        return self.failing(site) is None

    def failing(self, site: Site) -> str | None:
        """The first condition that does not hold for `site`; None if all hold."""
        names = (site.name, site.name.partition("#")[0])
        if self.name is not None and not any(fnmatch.fnmatchcase(n, self.name) for n in names):
            return "name"
        if self.regex is not None and not any(re.fullmatch(self.regex, n) for n in names):
            return "regex"
        if self.type is not None and self.type != site.op and self.type not in site.types:
            return "type"
        if self.position == "first" and not site.is_first:
            return "position"
        if self.position == "output" and not site.is_output:
            return "position"
        return None if self.where is None or self.where(site) else "where"

    def conditions(self) -> str:
        """The conditions as text: "name='layer4.*', type='Conv2d'"."""
        given = ((c, getattr(self, c)) for c in CONDITIONS)
        return ", ".join(f"{c}={value!r}" for c, value in given if value is not None)


@dataclass(frozen=True, kw_only=True)
class Policy(settings.Settings, settings.ExampleSettings):
    """How much of each layer's output gradient the backward pass keeps.

    >>> fxprop.Policy(keep=0.05)
    >>> fxprop.Policy(keep=0.05, rules=[fxprop.Rule(name="layer4.*", keep=0.2),
    ...                                 fxprop.Rule(type="Linear", keep=1.0)])

    Settings (a rule may override each):
        keep: share kept, 0 < keep <= 1; 1.0 means dense. Or
        k: how many are kept, at least 1; k >= n means dense. With neither, layers stay dense unless a
            rule says otherwise. k follows from keep as max(1, floor(keep * n + 0.5)).
        keep_input, keep_weight: the shares for the gradients of the layer's input and of its weight, 0 to
            1, where they are not `keep` or `k`. With keep_input=0 nothing upstream gets a gradient through
            the layer, and none is computed; with keep_weight=0 the weight gets none (None, not zeros), as
            if it were frozen. The bias goes by `bias`: "selected" is what is kept for the weight.
        select: what is chosen: "channel", "element" or another of `fxprop.ops.selections`. Of "nonzero",
            which drops nothing, `keep` is not asked.
        score: "l1", "l2", "random", or a name given to `fxprop.ops.register_score`.
        round_to: k is rounded up to a multiple of this, and capped at n.
        bias: "full" (bias gradient from all of grad_output) or "selected".
        sync_selection: sum the scores over all processes of torch.distributed, so that every process
            keeps the same channels; has no meaning for "element".
        score_fraction: scores of "channel" from this share of the batch, from its beginning.
        regions: rewrite a convolution together with the batch-norm and ReLU that follow it, or a linear
            layer with its activation, so that their backward runs for the kept channels only ("channel";
            "l1", "l2" or "random").
        norm_grad: in a region, "kept" gives gamma and beta a gradient in the kept channels only.
        weight_grad: "row_sparse" gives the weights of convolutions and linear layers ("channel") a sparse
            tensor with the kept rows for gradient, as `nn.Embedding(sparse=True)` does, so that SGD without
            momentum, SparseAdam and Adagrad pay for these rows only. Other optimizers refuse it.
        score_weight: rank the channels for the input's gradient by the norm of the output gradient times
            that of the channel's weights ("channel", "l2"); such layers are rewritten without their norm
            and activation.
        when: "faster" leaves a layer dense where fxprop's cost model predicts that a sparse backward
            would not be faster ("channel"; needs shapes); "always" rewrites it anyway.

    Settings of the mini-batch:
        examples: the share of its examples whose gradient enters the backward, or "auto". Everything
            behind that point, sparse or not, runs on these alone.
        examples_select: "importance" (drawn by gradient norm, weighted: unbiased), "top" or "random".
        examples_least, examples_factor: of "auto": share = factor / (1 + CV^2), at least the least, with CV
            the deviation of the examples' gradient norms over their mean.

    For each site, in this order:
        1. what cannot be rewritten is skipped, with the reason;
        2. the first rule whose conditions all hold decides what it sets;
        3. an output layer stays dense, unless that rule sets keep or k;
        4. the policy's own settings supply the rest.

    A rule that matches no site raises PolicyError with the nearest names (`allow_unmatched=True`
    permits it).
    """

    rules: Sequence[Rule] = ()
    allow_unmatched: bool = False

    def __post_init__(self) -> None:
        _check(self, "policy")
        for setting in (*settings.SETTINGS, *settings.OF_EXAMPLES):
            if setting.default is not None and getattr(self, setting.name) is None:
                raise PolicyError(
                    f"policy: {setting.name}=None: expected a value; leave it out for the default"
                )
        rules = tuple(self.rules)
        for rule in rules:
            if not isinstance(rule, Rule):
                raise PolicyError(f"policy: rules contain {rule!r}: expected fxprop.Rule objects")
        object.__setattr__(self, "rules", rules)
        if self.takes_examples and "row" in (self.select, *(rule.select for rule in rules)):
            raise PolicyError(
                f"policy: examples={self.examples!r} and select='row': rows are chosen among those of all "
                "examples, so that one cannot go without the others; take select='channel', or leave "
                "examples out"
            )
        if not isinstance(self.allow_unmatched, bool):
            raise PolicyError(f"policy: allow_unmatched={self.allow_unmatched!r}: expected true or false")

    @classmethod
    def fast(cls, keep: float, **others: Any) -> Policy:
        """The fastest settings; an approximation of the exact rule.

        >>> fxprop.Policy.fast(keep=0.05)

        Scores (score="l2") come from a quarter of the batch, and biases and a batch-norm behind a
        convolution get gradients for the kept channels only. `others` override these, or add rules. The
        guide compares speed, gradients and accuracy with the exact rule's.
        """
        fast: dict[str, Any] = {
            "score": "l2",
            "score_fraction": 0.25,
            "norm_grad": "kept",
            "bias": "selected",
        }
        return cls(keep=keep, **{**fast, **others})

    def resolve(self, sites: Iterable[Site]) -> Plan:
        """One decision per site. Does not check for unmatched rules: see `check_all_match`."""
        decisions = settle_shared_code([self._decide(site) for site in sites])
        return self.with_chains(decisions)

    def with_chains(self, decisions: Sequence[Decision]) -> Plan:
        """The plan of these decisions; layers hand channels to one another unless examples are taken."""
        return Plan(find_unreached(decisions if self.takes_examples else form_chains(decisions)))

    @property
    def takes_examples(self) -> bool:
        """Whether the backward may run on some of the examples."""
        return self.examples != 1

    def check_all_match(self, sites: Sequence[Site]) -> None:
        """Raise PolicyError for the first rule that matches none of `sites`."""
        if self.allow_unmatched:
            return
        for number, rule in enumerate(self.rules, start=1):
            if not any(rule.matches(site) for site in sites):
                raise PolicyError(
                    f"rule {number} ({rule.conditions()}) matches no layer. {_near_misses(rule, sites)} "
                    "Correct the rule, remove it, or pass allow_unmatched=True. "
                    "fxprop.layers(model, example_inputs) lists every name."
                )

    def with_keep(
        self,
        keep: float | None = None,
        *,
        keep_input: float | None = None,
        keep_weight: float | None = None,
    ) -> Policy:
        """This policy with another keep ratio wherever it is sparse; its 1.0 stay 1.0.

        >>> Policy(keep=0.05, rules=[Rule(name="fc", keep=1.0), Rule(name="layer4.*", k=3)]).with_keep(0.2)

        `keep` is for both gradients, in place of the shares for each; without it the share that is not
        given stays.
        """
        named = {"keep": keep, "keep_input": keep_input, "keep_weight": keep_weight}
        given: dict[str, Any] = {name: share for name, share in named.items() if share is not None}
        for name, share in given.items():
            settings.check(name, share, name)
        if keep is not None:
            given = {**dict.fromkeys(settings.AMOUNTS), **given}
        dense = {"keep": 1.0}
        rules = [
            replace(rule, **given) if given_by(rule).items() - dense.items() else rule
            for rule in self.rules
        ]
        return replace(self, **given, rules=rules)

    def _decide(self, site: Site) -> Decision:
        if site.skip is not None:
            return Decision(site, "skipped", site.skip, decided_by="fxprop")
        decided_by, rule = "default", None
        for number, candidate in enumerate(self.rules, start=1):
            if candidate.matches(site):
                decided_by, rule = f"rule {number} ({candidate.conditions()})", candidate
                break
        policy = self._with(rule)
        selection = SELECTIONS[policy.select]
        asked = asked_of(policy)
        if not selection.exact and all(of.is_all for of in asked):
            return Decision(site, "dense", "keep = 1", decided_by=decided_by)
        sets_amount = rule is not None and bool(given_by(rule))
        drops_nothing = selection.exact and all(of.share != 0 for of in asked)
        if drops_nothing and (site.axes is None or selection.alone(site.axes) is None):
            reason = available.why_not() or available.UNKNOWN
            return Decision(site, "dense", reason, decided_by=decided_by)
        if site.is_output and not sets_amount:
            return Decision(site, "dense", "output layer", decided_by="output layer")
        n = site.n(policy.select)
        if n is None:
            reason = f"select={policy.select!r} needs shapes that are known only with example_inputs"
            return Decision(site, "skipped", reason, decided_by=decided_by)
        of_layer, dropped = settings.of_layer(policy, site)
        if selection.counts_batch and policy.round_to != 1 and any(of.k is None for of in asked):
            dropped += (f"round_to={policy.round_to}: how many rows there are is known only at run time",)
        kept = [kept_of(policy, of, n) for of in asked]
        larger = max(kept, key=lambda of: (of.k, of.share or 0))
        if not selection.exact and all(of == (n, None) for of in kept):
            return Decision(site, "dense", f"k = n = {n}", decided_by=decided_by)
        of_layer, dropped = _of_whole_weight(of_layer, dropped, kept[1], n)
        for_input, for_weight = (None if of == larger else of for of in kept)
        region = Sparsity(larger.k, n, larger.share, for_input, for_weight, region=True, **vars(of_layer))
        alone = replace(region, region=False, norm_grad="full")
        fits = _fits_region(site, region, policy) and (
            policy.when == "always" or cost.region_wins(site, region)
        )
        sparsity = region if fits else alone
        has_norm = fits and site.region is not None and "norm_grad" not in site.region.kind.without
        if policy.norm_grad != "full" and not has_norm:
            dropped += (f"norm_grad={policy.norm_grad!r}: the layer is rewritten without a batch norm",)
        if policy.when == "faster" and not sparsity.stops:
            slow = cost.why_not_faster(site, sparsity)
            if slow is not None:
                return Decision(site, "dense", slow, decided_by=decided_by)
        return Decision(site, "rewritten", None, sparsity, decided_by, dropped)

    def _with(self, rule: Rule | None) -> Policy:
        """This policy with `rule`'s settings in place of its own."""
        given = {s: getattr(rule, s) for s in settings.NAMES if getattr(rule, s, None) is not None}
        if "keep" in given or "k" in given:
            given = {**dict.fromkeys(settings.AMOUNTS), **given}
        return replace(self, rules=(), **given)


def _check(given: Rule | Policy, where: str) -> None:
    settings.check_all(given, where)
    try:
        if given.score is not None:
            get_score(given.score)
    except OpError as error:
        raise PolicyError(str(error)) from None


def _fits_region(site: Site, sparsity: Sparsity, policy: Policy) -> bool:
    return (
        policy.regions
        # what has two choices of its own, or keeps all or nothing, has nothing to compute together
        and not sparsity.score_weight
        and 0 < sparsity.k < sparsity.n
        and site.region is not None
        and site.axes is not None
        and not site.axes.depthwise
        and SELECTIONS[policy.select].of_channels
        and policy.score in FROM_SUMS
    )


def _of_whole_weight(
    of_layer: settings.LayerSettings, dropped: tuple[str, ...], for_weight: Kept, n: int
) -> tuple[settings.LayerSettings, tuple[str, ...]]:
    """Without row-sparse gradients, where all rows of the weight get one, or none."""
    if of_layer.weight_grad == "dense" or 0 < for_weight.k < n:
        return of_layer, dropped
    what = "all" if for_weight.k else "nothing"
    why = f"weight_grad={of_layer.weight_grad!r}: {what} is kept for the weight's gradient"
    return replace(of_layer, weight_grad="dense"), (*dropped, why)


def _near_misses(rule: Rule, sites: Sequence[Site]) -> str:
    if not sites:
        return "The model has no layer that a rule could match."
    for pattern in (rule.name, rule.regex):
        if pattern is not None:
            names = [site.name for site in sites]
            parents = {name.rsplit(".", depth)[0] for name in names for depth in (1, 2)}
            near = difflib.get_close_matches(
                pattern, [*names, *(f"{parent}.*" for parent in sorted(parents))], cutoff=0.4
            )
            return f"Nearest names: {', '.join(near or names[:3])}."
    kinds = sorted({site.op for site in sites} | {t for site in sites for t in site.types})
    return f"Known types: {', '.join(kinds)}."


def rule_fields(*, in_files: bool) -> tuple[str, ...]:
    """The names that a rule may set, in order; `where` cannot be written to a file."""
    names = (*CONDITIONS, *settings.NAMES)
    return tuple(n for n in names if n != "where") if in_files else names
