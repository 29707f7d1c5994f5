"""Decisions that depend on one another.

One piece of code that is used twice, convolutions in a row, and layers that no gradient arrives at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxprop.ops.selections import SELECTIONS
from fxprop.plan.decisions import Chain, Decision, Sparsity
from fxprop.plan.sites import Site


def settle_shared_code(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """Sites that are several uses of one piece of code get one decision."""
    # one use of each code: the first that is not rewritten, or else the first
    decisive: dict[tuple[str, str, str, int | None], Decision] = {}
    for decision in decisions:
        code = _code_of(decision.site)
        if decisive.setdefault(code, decision).status == "rewritten" != decision.status:
            decisive[code] = decision
    agreed = []
    for decision in decisions:
        # the model's own graph has a node for each use
        in_part = decision.site.graph or not decision.site.is_node
        other = decisive[_code_of(decision.site)] if in_part else decision
        if decision.status == "rewritten" and other.status != "rewritten":
            reason = f"shares its code with {other.site.name}, which stays dense: {other.reason}"
            decision = Decision(decision.site, "dense", reason, decided_by=decision.decided_by)
        elif decision.status == "rewritten":
            decision = replace(decision, sparsity=other.sparsity)
        agreed.append(decision)
    return tuple(agreed)


def _code_of(site: Site) -> tuple[str, str, str, int | None]:
    return site.graph, site.node, site.name.partition("#")[0], site.n("channel")


def form_chains(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """The convolutions whose input a region gives to them alone compute grad_input as far as it is read.

    The region reads only a part of its grad_output if its scores come from a part of the batch and its
    norm gets gradients for kept channels only.
    """
    regions = {(d.site.graph, d.node): d for d in decisions if d.region is not None}
    chained = []
    for decision in decisions:
        site, sparsity = decision.site, decision.sparsity
        if sparsity is not None:
            upstream = regions.get((site.graph, site.call.input.node or "")) if site.call else None
            chain = _chain(site, sparsity, upstream)
            decision = replace(decision, sparsity=replace(sparsity, chain=chain))
        chained.append(decision)
    return tuple(chained)


def find_unreached(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """Marks the sites that no gradient arrives at, since all behind them keep nothing for grad_input."""
    passes = {d.site.name: d.sparsity is None or d.sparsity.of_each[0] > 0 for d in decisions}
    if all(passes.values()):
        return tuple(decisions)
    reached: dict[str, bool] = {"": True}
    found = []
    for decision in reversed(decisions):
        site = decision.site
        is_reached = site.behind is None or any(
            # a second use in a loop may run before what it is behind: then it is taken for reached
            passes[name] and reached.get(name, True) if name else True
            for name in site.behind
        )
        reached[site.name] = is_reached
        found.append(replace(decision, reached=is_reached))
    return tuple(reversed(found))


def _chain(site: Site, sparsity: Sparsity, upstream: Decision | None) -> Chain | None:
    if upstream is None or upstream.sparsity is None or upstream.region is None:
        return None
    of = upstream.sparsity
    reads_none = sparsity.of_each[0] == 0
    is_conv = site.op in ("conv1d", "conv2d", "conv3d") and site.groups == 1
    hands_over = is_conv and site.is_only_reader and SELECTIONS[sparsity.select].of_channels
    if reads_none or not (hands_over and upstream.region.kind.reads_part(of)):
        return None
    return Chain(upstream.site.name, of.k, of.n, of.score_fraction)
