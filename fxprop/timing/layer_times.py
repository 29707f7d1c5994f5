"""How long the backward of one site takes, dense and sparse, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprop.ops.activations import ACTIVATIONS
from fxprop.ops.catalogue import OPERATORS, Operator, arguments
from fxprop.ops.entries import available
from fxprop.ops.reads import Product
from fxprop.ops.regions.table import RegionKind
from fxprop.ops.selections import SELECTIONS
from fxprop.plan.decisions import Sparsity
from fxprop.plan.sites import Operand, Site

# a timing takes at least so long, in seconds: the call is repeated to fill it
_SHORTEST = 2e-3


class SiteTimes(NamedTuple):
    """Medians in seconds of the backward; of a region, batch-norm and ReLU included on both sides."""

    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """How many times as fast the sparse backward is."""
        return self.dense / self.sparse


class Conditions(NamedTuple):
    """What a timing depends on besides the site."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool = False

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        layout = " channels_last" if self.channels_last else ""
        return f"{name} {torch.get_num_threads()} threads {self.dtype}{layout} torch {torch.__version__}"


def key(site: Site, sparsity: Sparsity, conditions: Conditions) -> str:
    """The same text for what takes the same time."""
    call = site.call
    constants = {} if call is None else dict(sorted(call.constants.items()))
    needs = (site.needs_grad_input, site.needs_grad_weight, call is not None and call.bias is not None)
    parts = [site.op, site.input_shape, site.weight_shape, constants, needs, sparsity, conditions]
    if not SELECTIONS[sparsity.select].of_slices and available.why_not() is None:
        parts.append("with loops")
    return " ".join(map(str, parts))


def can_time(site: Site) -> bool:
    """Whether `time_site` can stand in for the site: shapes known, all constants plain."""
    if site.call is None or site.input_shape is None or site.weight_shape is None:
        return False
    return not any(isinstance(value, Operand) for value in site.call.constants.values())


def time_site(site: Site, sparsity: Sparsity, conditions: Conditions, rounds: int = 5) -> SiteTimes:
    """The site's backward on random tensors of its shapes, dense and sparse in turn."""
    assert site.call is not None
    assert site.input_shape is not None
    assert site.weight_shape is not None
    made: dict[str, Any] = {"device": conditions.device, "dtype": conditions.dtype}
    input = torch.randn(site.input_shape, **made)
    if conditions.channels_last and input.dim() == 4:
        input = input.to(memory_format=torch.channels_last)
    if site.call.pad is not None:
        pad, mode = site.call.pad
        input = F.pad(input, pad, mode)
    input.requires_grad_(site.needs_grad_input)
    weight = torch.randn(site.weight_shape, **made, requires_grad=site.needs_grad_weight)
    bias = None
    if site.call.bias is not None:
        assert site.out_channels is not None
        bias = torch.randn(site.out_channels, **made, requires_grad=site.needs_grad_weight)
    product = Product(site.op, input, weight, bias, site.call.constants)
    leaves = [t for t in (input, weight, bias) if t is not None and t.requires_grad]
    outputs = []
    for build in (_dense, _sparse):
        norm = None
        if sparsity.region and site.region is not None and site.region.norm_class is not None:
            norm = site.region.norm_class(*site.region.norm_arguments, **made)
            leaves += norm.parameters() if site.needs_grad_weight else ()
        outputs.append(build(site, sparsity, product, norm))
    gradient = torch.randn_like(outputs[0])

    def backward(output: Tensor) -> Callable[[], Any]:
        if not output.requires_grad:  # nothing is kept for any gradient
            return lambda: None
        return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True, allow_unused=True)

    dense, sparse = time_interleaved([backward(output) for output in outputs], rounds, conditions.device)
    return SiteTimes(dense, sparse)


def _dense(site: Site, sparsity: Sparsity, product: Product, norm: nn.Module | None) -> Tensor:
    args, kwargs = arguments(product)
    # an operator that keeps everything is the dense function
    output: Tensor = OPERATORS[site.op].sparse(*args, **kwargs, k=2**62)
    if norm is not None:
        output = norm(output)
    if sparsity.region and site.region is not None and site.region.activation is not None:
        output = ACTIVATIONS[site.region.activation](output)
    return output


def _sparse(site: Site, sparsity: Sparsity, product: Product, norm: nn.Module | None) -> Tensor:
    args, kwargs = arguments(product)
    called: Operator | RegionKind = OPERATORS[site.op]
    if sparsity.region:
        assert site.region is not None
        called = site.region.kind
        kwargs = {**kwargs, "activation": site.region.activation}
        args = args if norm is None else (*args, norm)
    output: Tensor = called.sparse(*args, **kwargs, **sparsity.keep.arguments(called.without))
    return output


def time_interleaved(calls: list[Callable[[], Any]], rounds: int, device: torch.device) -> list[float]:
    """Median seconds of each call; every round makes all of them, so that a slow moment hits all."""

    def seconds(call: Callable[[], Any], times: int) -> float:
        start = now(device)
        for _ in range(times):
            call()
        return (now(device) - start) / times

    for call in calls:
        call()
    times = [max(1, int(_SHORTEST / seconds(call, 1))) for call in calls]
    by_round = [[seconds(call, n) for call, n in zip(calls, times, strict=True)] for _ in range(rounds)]
    return [statistics.median(of_call) for of_call in zip(*by_round, strict=True)]


def now(device: torch.device) -> float:
    """The clock in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
