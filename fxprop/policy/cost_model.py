"""Will a sparse backward be faster? A guess from bytes moved and FLOPs, without measuring.

The dense backward is two products; the sparse one is two smaller products, a pass over grad_output for the
scores, and the gather and scatter of what is kept. Times are in units of one FLOP of a large product; what
memory and convolutions take beside it is the machine's (see `machine`). Slices of layers that fit in a
cache are not modelled: what they cost is mostly the calls. examples/benchmarks/cost_model.py shows how
well it does; `fxprop.tune` measures instead.
"""

from __future__ import annotations

import math

from fxprop.ops.kernels import few_channels
from fxprop.ops.selections import SELECTIONS, Sizes
from fxprop.plan.decisions import Sparsity
from fxprop.plan.sites import Site
from fxprop.policy.machine import Machine, machine

# entries of input, weight and output together that a core's cache holds
IN_CACHE = 2**18
# moves of its kept input and grad_input, besides those that a dense one makes too
DEPTHWISE_GATHER = 18.0
# channels by which products round up what they compute, on the average
_ROUNDED = 4.4
# calls, and kernels that do less well on few channels
UNMODELLED = 1.14
# what single entries of a convolution have to promise: the loops do less well between other layers
ENOUGH = 1.3


def region_wins(site: Site, sparsity: Sparsity) -> bool:
    """Whether what follows the layer is better rewritten with it than left alone."""
    assert site.region is not None
    assert site.axes is not None
    has_bias = site.call is not None and site.call.bias is not None
    return site.region.kind.wins(site.axes, has_bias, sparsity)


def why_not_faster(site: Site, sparsity: Sparsity) -> str | None:
    """Why the site should stay dense; None if a sparse backward should win, or nothing is known."""
    speedup = predicted_speedup(site, sparsity)
    of_slices = SELECTIONS[sparsity.select].of_slices
    is_convolution = site.op.startswith("conv")
    if speedup is None or speedup >= (ENOUGH if is_convolution and not of_slices else 1):
        return None
    assert site.axes is not None
    if not of_slices:
        what = f"{sparsity.amount} of {sparsity.n} entries are too many for what each saves"
        asked = f" where {ENOUGH:g}x is asked for" if speedup >= 1 else ""
        return f"{site.op}, {what}: predicted {speedup:.1f}x{asked}; when='always' rewrites it anyway"
    kind = "depthwise" if site.axes.depthwise else "1x1" if _is_pointwise(site) else site.op
    return f"{kind}, memory-bound: predicted {speedup:.1f}x; when='always' rewrites it anyway"


def predicted_speedup(site: Site, sparsity: Sparsity) -> float | None:
    """Time of the dense backward over that of the sparse one; None where it is not modelled."""
    shapes = (site.input_shape, site.weight_shape, site.output_shape)
    selection, axes = SELECTIONS[sparsity.select], site.axes
    if axes is None or axes.multiply_adds is None or None in shapes:
        return None
    needs = (site.needs_grad_input, site.needs_grad_weight)
    sizes = Sizes(*(float(math.prod(shape)) for shape in shapes if shape is not None))
    if not any(needs) or (selection.of_slices and sum(sizes) < IN_CACHE):
        return None
    if not selection.of_slices:
        alone = selection.alone(axes)
        if alone is None or selection.exact:
            return None
        if sparsity.is_one:
            return alone.speedup(sparsity.k, sum(needs), axes.examples)
        # each gradient chooses for itself; what keeps all is dense
        apart = [
            1 if k == sparsity.n else 1 / alone.speedup(k, 1, axes.examples)
            for k, needed in zip(sparsity.of_each, needs, strict=True)
            if needed and k
        ]
        return sum(needs) / sum(apart) if apart else math.inf
    here = machine()
    flops, entry = dense_work(site, here), here.entry
    dense = sparse = moved = 0.0
    gathered: set[float] = set()
    for needed, k, weight_is_written in zip(needs, sparsity.of_each, (False, True), strict=True):
        if not needed:
            continue
        share = k / sparsity.n
        dense += flops + entry * sum(sizes)
        if share == 1:
            sparse += flops + entry * sum(sizes)
        elif share:
            sparse += kept_work(site, sparsity, k, here)
            sparse += entry * selection.moved_by_product(sizes, share, axes.depthwise)
            sparse += 1.5 * entry * sizes.weight * weight_is_written  # zeros first
            gathered.add(share)
    # in a region they come with the pass that the norm's or the activation's backward makes
    scored = 0 if sparsity.region or not gathered else selection.scored(axes, sparsity)
    for share in gathered:
        moved += selection.moved_once(sizes, share)
        if axes.depthwise:
            moved += DEPTHWISE_GATHER * share * sizes.input + sizes.input
    sparse += entry * (scored + moved)
    return dense / (UNMODELLED * sparse) if sparse else math.inf


def dense_work(site: Site, here: Machine) -> float:
    """One of the layer's two products, without what it moves."""
    assert site.axes is not None
    assert site.axes.multiply_adds is not None
    if site.axes.depthwise:
        each = here.depthwise
    elif not site.op.startswith("conv"):
        each = 1.0
    else:
        each = here.pointwise if _is_pointwise(site) else here.convolution
    return 2.0 * site.axes.multiply_adds * each


def kept_work(site: Site, sparsity: Sparsity, k: int, here: Machine) -> float:
    """The same for k of n, by the kernels that are run for so few."""
    dense, share = dense_work(site, here), k / sparsity.n
    if sparsity.select != "channel":
        return share * dense
    rounded = min(1.0, share * (1 + _ROUNDED / k))
    assert site.axes is not None
    if site.axes.depthwise or not site.op.startswith("conv"):
        return rounded * dense
    if site.groups == 1 and not site.op.startswith("conv_transpose"):
        if _is_pointwise(site):
            # by matrix products, as few channels of other convolutions
            return rounded * dense / here.pointwise
        size, out_size = (site.input_shape or ())[2:], (site.output_shape or ())[2:]
        if size == out_size and few_channels.pays(k, math.prod(size)):
            return rounded * dense / here.convolution
    return min(1.0, share * few_channels.in_blocks(k) / k) * dense


def _is_pointwise(site: Site) -> bool:
    return site.op.startswith("conv") and all(size == 1 for size in (site.weight_shape or ())[2:])
