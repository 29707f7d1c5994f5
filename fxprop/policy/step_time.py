"""How many times as fast should the backward and the whole step become?

`cost_model` judges single layers; here is what stands beside them: the forward, norms and activations,
products without weights, SGD. Times are in the cost model's unit. The constants are fitted to the guide's
eight models on three x86 CPUs (examples/benchmarks/predictions.py shows how well); what was timed on a
machine takes the place of a layer's prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fxprop.ops.scores import count_of
from fxprop.ops.selections import SELECTIONS, Sizes
from fxprop.plan.decisions import Chain, Decision, Plan, Timing
from fxprop.policy.cost_model import (
    DEPTHWISE_GATHER,
    IN_CACHE,
    UNMODELLED,
    dense_work,
    kept_work,
    predicted_speedup,
)
from fxprop.policy.machine import Machine, machine

# entries moved for norms, activations, sums and copies, per entry of a layer's larger side
BETWEEN_FORWARD, BETWEEN_BACKWARD = 5.0, 6.5
# share of that which a region needs for the channels that it does not keep
_REGION = 0.52
# entries moved by SGD per weight
_OPTIMIZER = 5.5
# choosing examples, and taking and spreading their rows, as a share of the dense backward
_EXAMPLES = 0.1
# selections whose products are smaller dense ones
_SLICES = ("channel", "row")

Measured = Callable[[Decision], Timing | None]


@dataclass(frozen=True)
class Clock:
    """How many times as fast as dense the backward and the whole training step should be."""

    backward: float
    step: float
    # "measured" where layers were timed: for these the times are, for the rest the prediction's
    basis: Literal["predicted", "measured"]
    machine: str
    layers_measured: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As in the report schema."""
        return vars(self)


@dataclass
class _Times:
    """Sums, in the time of one FLOP of a large product."""

    forward: float = 0.0
    dense: float = 0.0
    sparse: float = 0.0
    optimizer: float = 0.0
    # whether its size is one that the cost model knows, or it was timed
    known: bool = False


def predict(
    plan: Plan, other: int, examples: tuple[int, int] = (1, 1), measured: Measured = lambda decision: None
) -> Clock | None:
    """What to expect of a plan on the clock; None where nothing is left out, or most layers fit in a cache.

    `other` is FLOPs of the backward outside the plan's layers. Of `examples`, k of n enter the backward.
    Layers with unknown shapes count as if they were not there.
    """
    k, n = examples
    if not plan.rewritten and k == n:
        return None
    here = machine()
    layers = [(d, times) for d in plan.decisions if (times := _layer(d, here)) is not None]
    timed = [(times, timing) for d, times in layers if (timing := measured(d)) is not None]
    _put_in_place(timed)
    total = _Times(
        forward=sum(times.forward for _, times in layers) + other / 2,
        dense=sum(times.dense for _, times in layers) + other,
        sparse=sum(times.sparse for _, times in layers) + other,
        optimizer=sum(times.optimizer for _, times in layers),
    )
    known = sum(times.dense for _, times in layers if times.known) + other
    if not total.sparse or known < total.dense / 2:
        return None
    sparse = total.sparse
    if k != n:
        sparse = total.sparse * k / n + _EXAMPLES * total.dense
    rest = total.forward + total.optimizer
    devices = sorted({timing.device for _, timing in timed})
    return Clock(
        backward=total.dense / sparse,
        step=(rest + total.dense) / (rest + sparse),
        basis="measured" if timed else "predicted",
        machine=f"this machine's {', '.join(devices)}" if timed else here.name,
        layers_measured=len(timed),
    )


def _put_in_place(timed: Iterable[tuple[_Times, Timing]]) -> None:
    """Measured seconds in place of predictions, in the unit in which these are right as a whole."""
    timed = list(timed)
    seconds = sum(timing.dense for _, timing in timed)
    if not seconds:
        return
    unit = sum(times.dense for times, _ in timed) / seconds
    for times, timing in timed:
        times.dense, times.sparse, times.known = unit * timing.dense, unit * timing.sparse, True


def _layer(decision: Decision, here: Machine) -> _Times | None:
    """A layer with what follows it; None where shapes are not known."""
    site, sparsity = decision.site, decision.sparsity
    shapes = (site.input_shape, site.weight_shape, site.output_shape)
    axes = site.axes
    if decision.status == "skipped" or axes is None or axes.multiply_adds is None or None in shapes:
        return None
    sizes = Sizes(*(float(math.prod(shape)) for shape in shapes if shape is not None))
    entry = here.entry
    product = dense_work(site, here) + entry * sum(sizes)
    larger = entry * max(sizes.input, sizes.output)
    needs = (site.needs_grad_input, site.needs_grad_weight)
    between = BETWEEN_BACKWARD * larger * any(needs)
    dense = product * sum(needs) + between
    times = _Times(
        forward=product + BETWEEN_FORWARD * larger,
        dense=dense,
        sparse=dense,
        optimizer=_OPTIMIZER * entry * sizes.weight * site.needs_grad_weight,
        known=sum(sizes) >= IN_CACHE,
    )
    if not decision.reached:
        times.sparse = 0.0
        return times
    if sparsity is None or not any(needs):
        return times
    selection, share = SELECTIONS[sparsity.select], sparsity.k / sparsity.n
    if not any(k for k, needed in zip(sparsity.of_each, needs, strict=True) if needed):
        times.sparse = between
        return times
    if sparsity.select not in _SLICES:
        speedup = predicted_speedup(site, sparsity)
        computed = sum(needed and k > 0 for k, needed in zip(sparsity.of_each, needs, strict=True))
        masked = product * computed + entry * selection.moved_once(sizes, share)
        times.sparse = between + (masked if speedup is None else product * sum(needs) / speedup)
        return times
    of_all = (_read_by(sparsity.chain, site.input_shape), 1.0)
    for needed, reads, k in zip(needs, of_all, sparsity.of_each, strict=True):
        if needed and k:
            moved = entry * selection.moved_by_product(sizes, k / sparsity.n, axes.depthwise)
            times.sparse += reads * kept_work(site, sparsity, k, here) + moved - product
        elif needed:
            times.sparse -= product
    scored = 0 if sparsity.region else selection.scored(axes, sparsity)
    once = selection.moved_once(sizes, share) + 1.5 * sizes.weight * (needs[1] and sparsity.of_each[1] > 0)
    if axes.depthwise:
        once += DEPTHWISE_GATHER * share * sizes.input + sizes.input
    alone = times.sparse - between + entry * (scored + once)
    if sparsity.region:
        between *= _REGION + (1 - _REGION) * share
    times.sparse = UNMODELLED * alone + between
    return times


def _read_by(chain: Chain | None, input_shape: tuple[int, ...] | None) -> float:
    """The part of grad_input that is computed: all, but for what a chain leaves out."""
    if chain is None or not input_shape:
        return 1.0
    whole = count_of(chain.score_fraction, input_shape[0]) / max(1, input_shape[0])
    return whole + (1 - whole) * chain.k / chain.n
