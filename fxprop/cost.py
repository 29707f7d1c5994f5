"""Will a sparse backward be faster? A guess from bytes moved and FLOPs, without measuring.

The dense backward is two products; the sparse one is two smaller products, a pass over grad_output for the
scores, and the gather and scatter of what is kept. Times are in units of one FLOP of a large product; an
entry that is moved from or to memory costs `_ENTRY` of them. Layers that fit in a cache are not modelled:
what they cost is mostly the calls. The constants are fitted to a 2-core CPU with
AVX-512 (examples/benchmarks/cost_model.py shows how well); `fxprop.tune` measures instead.
"""

from __future__ import annotations

import math

from fxprop.ops.select import RANDOM
from fxprop.plan import Site, Sparsity

# FLOPs in the time that one entry takes between memory and core
_ENTRY = 60.0
# entries of input, weight and output together that a core's cache holds
_IN_CACHE = 2**18
# FLOPs of a large product in the time of one FLOP of a depthwise convolution
_DEPTHWISE = 12.0
# moves of its kept input and grad_input, besides those that a dense one makes too
_DEPTHWISE_GATHER = 18.0
# calls, and kernels that do less well on few channels
_UNMODELLED = 1.15

# entries of a region from which on one pass over them beats the separate kernels
_REGION = {"l2": 2**19, "random": 2**19, "l1": 2**22}


def region_wins(site: Site, sparsity: Sparsity) -> bool:
    """Whether what follows the layer is better rewritten with it than left alone."""
    if site.region is not None and site.region.norm is None:
        # a full pass over the gradient behind the activation costs what the activation's backward does
        has_bias = site.call is not None and site.call.bias is not None
        return sparsity.score_fraction <= 0.5 and not (has_bias and sparsity.bias == "full")
    if site.output_shape is None:
        return True
    least = 0 if sparsity.norm_grad == "kept" else _REGION[sparsity.score]
    return math.prod(site.output_shape) >= least


def entries_scored(site: Site, sparsity: Sparsity) -> int:
    """How many entries of grad_output are read for the scores of a site whose shapes are known.

    A `score_fraction` is a share of a convolution's batch, or of the rows of a product, rounded up.
    """
    assert site.output_shape is not None
    assert site.out_channels is not None
    if sparsity.score == RANDOM:
        return 0
    entries = math.prod(site.output_shape)
    if sparsity.score_fraction == 1 or not entries:
        return entries
    if site.op == "grouped_mm":
        rows = site.output_shape[0]
    elif site.is_convolution:
        batched = site.weight_shape is None or len(site.output_shape) == len(site.weight_shape)
        rows = site.output_shape[0] if batched else 1
    else:
        rows = entries // site.out_channels
    return math.ceil(sparsity.score_fraction * rows) * entries // rows


def why_not_faster(site: Site, sparsity: Sparsity) -> str | None:
    """Why the site should stay dense; None if a sparse backward should win, or nothing is known."""
    speedup = predicted_speedup(site, sparsity)
    if speedup is None or speedup >= 1:
        return None
    kind = "depthwise" if site.is_depthwise else "1x1" if _is_pointwise(site) else site.op
    return f"{kind}, memory-bound: predicted {speedup:.1f}x; when='always' rewrites it all the same"


def predicted_speedup(site: Site, sparsity: Sparsity) -> float | None:
    """Time of the dense backward over that of the sparse one; None where it is not modelled."""
    shapes = (site.input_shape, site.weight_shape, site.output_shape)
    if sparsity.select != "channel" or site.multiply_adds is None or None in shapes:
        return None
    input, weight, output = (float(math.prod(shape)) for shape in shapes if shape is not None)
    needs = (site.needs_grad_input, site.needs_grad_weight)
    if input + weight + output < _IN_CACHE or not any(needs):
        return None
    share = sparsity.k / sparsity.n
    flops = 2.0 * site.multiply_adds * (_DEPTHWISE if site.is_depthwise else 1)
    # a depthwise convolution reads and writes the kept channels of its input only
    of_input = share if site.is_depthwise else 1.0
    dense = sparse = 0.0
    for needed, weight_is_written in zip(needs, (False, True), strict=True):
        if needed:
            dense += flops + _ENTRY * (output + input + weight)
            sparse += share * flops + _ENTRY * (share * (output + weight) + of_input * input)
            sparse += 1.5 * _ENTRY * weight * weight_is_written  # zeros first
    # in a region they come with the pass that the norm's or the activation's backward makes
    scored = 0 if sparsity.region else entries_scored(site, sparsity)
    # the kept channels and weights are read and written once
    moved = 2 * share * (output + weight)
    if site.is_depthwise:
        moved += _DEPTHWISE_GATHER * share * input + input
    sparse += _ENTRY * (scored + moved)
    return dense / (_UNMODELLED * sparse)


def _is_pointwise(site: Site) -> bool:
    return site.is_convolution and all(size == 1 for size in (site.weight_shape or ())[2:])
