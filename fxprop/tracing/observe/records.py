"""What one run of a model showed: shapes, who needs a gradient, FLOPs, and how autograd connects it all.

Plain records, filled in `run.py` and read where sites are found. They hold no tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from fxprop.ops.reads import Product

# why a layer whose gradient the forward itself computes with stays as it is
USED = "the model's forward computes with its gradient (autograd.grad), which has to be exact"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor that may never have been computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    # whether the backward of the model as it is (with what is frozen) needs its gradient
    requires_grad: bool
    # where it is: "cpu", "cuda", "meta"
    device: str = "cpu"


def tensor_info(tensor: torch.Tensor) -> TensorInfo:
    """The record of `tensor`."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.requires_grad, tensor.device.type)


@dataclass
class GraphCall:
    """One call of one graph. Keys are node names."""

    outputs: dict[str, TensorInfo] = field(default_factory=dict)
    # of call_module nodes: the module's weight
    weights: dict[str, TensorInfo] = field(default_factory=dict)
    # the nodes whose output a gradient arrives at
    reached: set[str] = field(default_factory=set)
    # the autograd function (a number in `Autograd`) that made a node's output
    functions: dict[str, int] = field(default_factory=dict)
    # those at which one arrives while the model's forward runs
    used: set[str] = field(default_factory=set)
    # when a node ran, counted over the whole run
    order: dict[str, int] = field(default_factory=dict)


@dataclass
class ProductCall:
    """One product with a parameter in code that has no graph."""

    # qualified name of the module whose code calls it, and of the parameter
    module: str
    parameter: str
    # operands are TensorInfo
    product: Product
    output: TensorInfo
    order: int
    function: int | None
    source: str | None
    reached: bool = False
    # a gradient arrived at it while the model's forward ran
    used: bool = False


@dataclass
class Run:
    """What one run of a model showed."""

    # by qualified name of the traced module
    calls: dict[str, list[GraphCall]] = field(default_factory=dict)
    products: list[ProductCall] = field(default_factory=list)
    # modules kept as one call, and when each was called first
    opaque: dict[str, int] = field(default_factory=dict)
    autograd: Autograd = field(default_factory=lambda: Autograd({}))
    forward_flops: int = 0
    backward_flops: int = 0
    # whether it ran on real data, because the model reads values
    real: bool = False


@dataclass(frozen=True)
class Autograd:
    """The functions of an autograd graph as numbers, each with those its gradient flows to."""

    next: Mapping[int, tuple[int, ...]]

    def positions(self, sites: Collection[int]) -> tuple[set[int], set[int]]:
        """(first, output): the sites with no other site upstream, and with none downstream."""
        at, leading_to_one = set(sites), self.requiring(sites)
        below: set[int] = set()  # functions with a site downstream of them
        for function in reversed(self._upstream_first()):
            if function in below or function in at:
                below.update(self.next.get(function, ()))
        return {site for site in at if leading_to_one.isdisjoint(self.next.get(site, ()))}, at - below

    def behind(self, sites: Collection[int]) -> dict[int, set[int | None]]:
        """For each site those that its gradient comes from without passing another; None is an output."""
        at, order = set(sites), self._upstream_first()
        led_to = {n for of in self.next.values() for n in of}
        sources: dict[int, set[int | None]] = {f: set() if f in led_to else {None} for f in order}
        for function in reversed(order):
            handed = {function} if function in at else sources[function]
            for n in self.next.get(function, ()):
                sources[n] |= handed
        return {site: sources.get(site, set()) for site in at}

    def requiring(self, leaves: Collection[int]) -> set[int]:
        """The functions that a gradient to one of `leaves` passes."""
        reached = set(leaves)
        for function in self._upstream_first():
            if any(n in reached for n in self.next.get(function, ())):
                reached.add(function)
        return reached

    def _upstream_first(self) -> list[int]:
        """Every function after all that its gradient flows to."""
        order: list[int] = []
        seen: set[int] = set()
        for root in self.next:
            stack = [(root, False)]
            while stack:
                function, done = stack.pop()
                if done:
                    order.append(function)
                elif function not in seen:
                    seen.add(function)
                    stack.append((function, True))
                    stack.extend((n, False) for n in self.next.get(function, ()) if n not in seen)
        return order
