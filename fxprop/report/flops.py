"""Plan to numbers: the backward FLOPs of every layer. One multiply-add is 2 FLOPs.

A layer whose forward has `multiply_adds` costs twice that many FLOPs for grad_input and the same again for
grad_weight; with k of n kept, k/n of it, each gradient by its own k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fxprop.ops.axes import Axes
from fxprop.ops.scores import count_of
from fxprop.ops.selections import SELECTIONS
from fxprop.plan.decisions import Chain, Decision, Plan, Sparsity
from fxprop.policy import step_time
from fxprop.report.records import ExamplesKept, Gradients, Layer
from fxprop.report.report import Report


def make_report(
    plan: Plan,
    backward_flops: int | None,
    *,
    model: str,
    frontend: str,
    mode: str,
    note: str = "",
    untraced: Mapping[str, str] | None = None,
    policy: Mapping[str, Any] | None = None,
    examples: ExamplesKept | None = None,
    measured: step_time.Measured = lambda decision: None,
) -> Report:
    """The report on `plan`, for a model whose whole dense backward takes `backward_flops`.

    Where that is None, shapes are unknown and so are the numbers. Of `examples`, what is kept of the
    mini-batch is a factor on everything but `dense`. `measured` gives the times of layers that were timed.
    """
    counted = backward_flops is not None
    kept = (1, 1) if examples is None else examples.factor
    layers = tuple(_layer(decision, counted).of_part(*kept) for decision in plan.decisions)
    other = None
    if backward_flops is not None:
        # whatever the backward does beyond the listed layers: attention products, skipped layers
        other = backward_flops - sum(layer.dense.total for layer in layers if layer.dense)
    return Report(
        model=model,
        frontend=frontend,
        mode=mode,
        layers=layers,
        other=other,
        note=note,
        untraced=tuple((untraced or {}).items()),
        policy=policy,
        examples=examples,
        clock=None if other is None else step_time.predict(plan, other, kept, measured),
    )


def _layer(decision: Decision, counted: bool) -> Layer:
    site, sparsity = decision.site, decision.sparsity
    layer = Layer(
        name=site.name,
        op=site.op,
        status=decision.status,
        reason=decision.reason,
        decided_by=decision.decided_by,
        source=site.source,
        graph=site.graph,
        region=decision.region.label if decision.region else None,
        left_out=decision.dropped,
        input_shape=site.input_shape,
        weight_shape=site.weight_shape,
        output_shape=site.output_shape,
        groups=site.groups,
        select=sparsity.select if sparsity else None,
        score=sparsity.score if sparsity else None,
        k=sparsity.k if sparsity else None,
        k_input=sparsity.of_each[0] if sparsity else None,
        k_weight=sparsity.of_each[1] if sparsity else None,
        n=sparsity.n if sparsity else None,
        weight_grad=sparsity.weight_grad if sparsity else None,
        chain=sparsity.chain.upstream if sparsity and sparsity.chain else None,
        reached=decision.reached,
    )
    if not counted:
        return layer
    forward, dense, sparse, executed, select_ops = _counts(decision)
    return replace(
        layer, forward=forward, dense=dense, sparse=sparse, executed=executed, select_ops=select_ops
    )


def _counts(decision: Decision) -> tuple[int, Gradients, Gradients, Gradients, int]:
    """`forward`, `dense`, `sparse`, `executed` and `select_ops` of a layer."""
    site, sparsity = decision.site, decision.sparsity
    if decision.status == "skipped" or site.multiply_adds is None or site.output_shape is None:
        return 0, _NOTHING, _NOTHING, _NOTHING, 0
    forward = 2 * site.multiply_adds
    needs = (site.needs_grad_input, site.needs_grad_weight)
    dense = _gradients([forward, forward], needs)
    if not decision.reached:
        return forward, dense, _NOTHING, _NOTHING, 0
    if sparsity is None:
        return forward, dense, dense, dense, 0
    sparse = _gradients([forward * k // sparsity.n for k in sparsity.of_each], needs)
    if sparsity.chain is not None and site.input_shape is not None:
        chained = _count_chained(sparse.grad_input, sparsity.chain, site.input_shape[0])
        sparse = replace(sparse, grad_input=chained)
    assert site.axes is not None
    executed = sparse
    if not SELECTIONS[sparsity.select].of_slices:
        executed = _executed_for_entries(site.axes, sparsity, needs, sparse, dense)
    return forward, dense, sparse, executed, _select_ops(site.axes, sparsity, needs)


def _executed_for_entries(
    axes: Axes, sparsity: Sparsity, needs: tuple[bool, bool], sparse: Gradients, dense: Gradients
) -> Gradients:
    """What the loops over kept entries perform, or the dense kernels, whichever is to be expected."""
    selection = SELECTIONS[sparsity.select]
    alone = None if selection.exact else selection.alone(axes)
    products = sum(needs) if sparsity.is_one else 1
    for_input, for_weight = (
        sparse if not k or (alone is not None and alone.wins(k, products, axes.examples)) else dense
        for k in sparsity.of_each
    )
    return Gradients(for_input.grad_input, for_weight.grad_weight)


def _select_ops(axes: Axes, sparsity: Sparsity, needs: tuple[bool, bool]) -> int:
    selection = SELECTIONS[sparsity.select]
    # all or nothing is chosen without a look
    chosen = [k for k, needed in zip(sparsity.of_each, needs, strict=True) if needed and 0 < k < sparsity.n]
    if not any(needs) or not (chosen or selection.exact):
        return 0
    # single entries are ranked for each gradient that has a share of its own
    times = len(set(chosen)) if not (selection.of_slices or selection.exact) else 1
    return times * selection.select_ops(axes, sparsity)


def _count_chained(grad_input: int, chain: Chain, batch: int) -> int:
    """Whole for the examples that upstream chooses by, and its kept channels for the others."""
    whole = count_of(chain.score_fraction, batch)
    rest = grad_input * (batch - whole) // max(1, batch)
    return grad_input - rest + rest * chain.k // chain.n


def _gradients(flops: Sequence[int], needs: tuple[bool, bool]) -> Gradients:
    return Gradients(grad_input=flops[0] * needs[0], grad_weight=flops[1] * needs[1])


_NOTHING = Gradients(0, 0)
