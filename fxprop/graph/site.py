"""What every reader of a node needs: where it reads from, and what all sites have."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxprop.frontends.module import TracedModule
from fxprop.frontends.shapes import Run, TensorInfo
from fxprop.plan import Site

# the arguments of a convolution that are not tensors
GEOMETRY = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Context:
    traced: TracedModule
    run: Run | None


def with_shapes(
    site: Site, context: Context, node: fx.Node, weight: TensorInfo | None, groups: int
) -> Site:
    if weight is None:
        return replace(site, skip="its weight is not a tensor that can be read")
    site = replace(site, groups=groups, weight_shape=weight.shape, is_complex=weight.dtype.is_complex)
    run = context.run
    if run is None or site.call is None:
        return replace(site, needs_grad_weight=weight.requires_grad)
    input_ = run.outputs.get(site.call.input.node or "")
    output = run.outputs.get(node.name)
    if input_ is None or output is None:
        return replace(site, skip="its input or output is not a tensor")
    reached = node.name in run.reached
    return replace(
        site,
        input_shape=input_.shape,
        output_shape=output.shape,
        needs_grad_input=reached and input_.requires_grad,
        needs_grad_weight=reached and weight.requires_grad,
        is_complex=site.is_complex or input_.dtype.is_complex,
    )


def call_name(target: Callable[..., Any] | str) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_line(node: fx.Node) -> str | None:
    """The innermost line of the recorded stack that is not torch's own."""
    trace = node.meta.get("stack_trace")
    frames = [
        f
        for f in _FRAME.finditer(trace or "")
        if "/torch/nn/" not in f["file"] and "/torch/fx/" not in f["file"]
    ]
    return f"{frames[-1]['file']}:{frames[-1]['line']}" if frames else None
