"""Everything about one layer of a transformed model, as text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence

from torch import nn

from fxprop.errors import ReportError
from fxprop.inspection.code import code_changes, code_lines, describe_decision, generated_node, operation
from fxprop.ops.axes import Shape
from fxprop.ops.entries import available
from fxprop.ops.selections import SELECTIONS
from fxprop.pipeline.recipe import recipe_of
from fxprop.plan.decisions import Decision
from fxprop.policy.policy import Policy
from fxprop.report.records import Gradients, Layer

_WIDTH = 12


def explain(gm: nn.Module, layer: str) -> str:
    """What was decided about one layer, why, and what it costs.

    >>> print(fxprop.explain(gm, "layer3.0.conv2"))

    Says which rule decided and why the others did not, the shapes, the backward FLOPs as a formula with
    numbers (one multiply-add = 2), what `fxprop.tune` measured, and the code before and after. For the mode
    (train or eval) that the module is in. Raises ReportError for an unknown layer, with the nearest names;
    ModelError for a module that does not come from `fxprop.transform`.
    """
    recipe = recipe_of(gm)
    plan = recipe.plans[recipe.mode(gm.training)]
    decisions = {decision.site.name: decision for decision in plan.decisions}
    if layer not in decisions:
        near = difflib.get_close_matches(layer, decisions, cutoff=0.4) or list(decisions)[:3]
        raise ReportError(
            f"no layer {layer!r} in this model; nearest names: {', '.join(near)}. "
            "fxprop.layers(model, example_inputs) lists every name."
        )
    decision = decisions[layer]
    of_report = next(record for record in recipe.report(gm.training).layers if record.name == layer)
    facts = [
        ("operator", " ".join([decision.site.op, f"({decision.site.type})" if decision.site.type else ""])),
        ("graph node", _node(gm, decision)),
        ("shapes", _shapes(decision)),
        *_settings(decision),
        *((("because", decision.reason),) if decision.reason else ()),
        ("decided by", decision.decided_by),
        *_other_rules(recipe.in_force, decision),
        *_flops(decision, of_report),
        *((("clock", str(timing)),) if (timing := recipe.timing(decision)) else ()),
    ]
    lines = [f"  {name:<{_WIDTH}}{text.strip()}" for name, text in facts]
    return "\n".join([describe_decision(decision), *lines, *_code(gm, decision)]) + "\n"


def _node(gm: nn.Module, decision: Decision) -> str:
    """The node that computes the layer now, what it calls, and the module whose graph it is in."""
    node = generated_node(gm, decision)
    where = decision.site.graph or type(gm).__name__
    if node is None:
        return f"none: {decision.site.node} in code of {where} that has no graph"
    return f"{node.name} = {node.op} {operation(node)} in {where}"


def _shapes(decision: Decision) -> str:
    site = decision.site
    shapes = {"input": site.input_shape, "weight": site.weight_shape, "output": site.output_shape}
    known = [f"{name} {_times(shape, 'x')}" for name, shape in shapes.items() if shape is not None]
    return ", ".join([*known, f"groups {site.groups}"])


def _settings(decision: Decision) -> Iterator[tuple[str, str]]:
    sparsity = decision.sparsity
    if sparsity is None:
        return
    yield "keeps", f"k = {sparsity.k} of n = {sparsity.n} by {sparsity.score}, select {sparsity.select}"
    of_input, of_weight = sparsity.of_each
    if of_input != of_weight or not sparsity.k:
        yield "", f"{of_input} of them for grad_input, {of_weight} for grad_weight"
    if sparsity.score_weight:
        yield "", "for grad_input by the weight's norms as well"
    if decision.site.groups > 1:
        yield "", f"in each of {decision.site.groups} groups, or whole groups of one channel"
    if sparsity.score_fraction != 1:
        part = "each expert's rows" if decision.site.op == "grouped_mm" else "the batch"
        yield "", f"scores from {sparsity.score_fraction:g} of {part}"
    yield from _kernels(decision)
    yield "gradients", f"bias {sparsity.bias}, weight {sparsity.weight_grad}"
    if sparsity.chain is not None:
        chain = sparsity.chain
        yield "chain", f"grad_input for {chain.k} of {chain.n} channels, which {chain.upstream} reads"
    for at, why in enumerate(decision.dropped):
        yield "" if at else "left out", why


def _kernels(decision: Decision) -> Iterator[tuple[str, str]]:
    """By what single entries are computed, and why."""
    site, sparsity = decision.site, decision.sparsity
    assert sparsity is not None
    assert site.axes is not None
    selection = SELECTIONS[sparsity.select]
    if selection.of_slices:
        return
    loops, masked = "compiled loops (numba) over the kept entries alone", "the dense kernels, on the mask"
    alone, why = selection.alone(site.axes), available.why_not()
    products = site.needs_grad_input + site.needs_grad_weight
    if selection.exact:
        yield "kernels", f"{loops} where few are left, else the dense ones; known at each backward"
    elif alone is None:
        yield "kernels", f"{masked}: {why or available.UNKNOWN}"
    elif alone.wins(sparsity.k, products, site.axes.examples):
        yield "kernels", loops
    else:
        yield "kernels", f"{masked}: expected to be faster than the loops"


def _other_rules(policy: Policy, decision: Decision) -> Iterator[tuple[str, str]]:
    """Every rule that did not decide, and why it did not."""
    taken = False
    for number, rule in enumerate(policy.rules, start=1):
        failing = rule.failing(decision.site)
        if failing is None and not taken:
            taken = True
            if decision.decided_by.startswith(f"rule {number} "):
                continue
            why = f"matches, but {decision.decided_by} decides"
        else:
            why = "not reached: an earlier rule matches" if taken else f"its {failing} does not match"
        yield "", f"rule {number} ({rule.conditions()}): {why}"


def _flops(decision: Decision, layer: Layer) -> Iterator[tuple[str, str]]:
    site, sparsity = decision.site, decision.sparsity
    if not layer.dense or not site.multiply_adds or decision.status == "skipped":
        return
    yield "FLOPs", f"2 x {_formula(decision)} = {2 * site.multiply_adds:,} for each gradient"
    yield "dense", _gradients(layer.dense)
    if sparsity is not None and layer.sparse and layer.executed:
        chained = ", of grad_input only what the chain reads" if sparsity.chain else ""
        yield "sparse", f"{_gradients(layer.sparse)} (x {sparsity.amount} / {sparsity.n}{chained})"
        yield "executed", _gradients(layer.executed)


def _formula(decision: Decision) -> str:
    """The multiply-adds as a product, where they are the output's entries times the fan-in."""
    site = decision.site
    if site.output_shape is not None and site.weight_shape is not None:
        fan_in = site.weight_shape[1:]
        if math.prod((*site.output_shape, *fan_in)) == site.multiply_adds:
            return f"({_times(site.output_shape)}) outputs x ({_times(fan_in)}) fan-in"
    return f"{site.multiply_adds:,}"


def _times(shape: Shape, sign: str = " x ") -> str:
    return sign.join(map(str, shape))


def _gradients(of: Gradients) -> str:
    return f"grad_input {of.grad_input:,} + grad_weight {of.grad_weight:,} = {of.total:,}"


def _code(gm: nn.Module, decision: Decision) -> Sequence[str]:
    of_layer = [change for change in code_changes(gm) if change.decision == decision]
    if of_layer:
        return [
            "  code before",
            *(line for change in of_layer for line in change.before),
            "  code after",
            *(line for change in of_layer for line in change.after),
        ]
    lines = code_lines(gm, decision)
    return ["  code", *lines] if lines else []
