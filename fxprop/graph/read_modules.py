"""Reading module calls: torch.nn's convolutions and linear layers to sites, anything unsafe to a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxprop.graph.context import Context, own_tensor, with_shapes
from fxprop.graph.read_functions import type_names
from fxprop.ops.catalogue import SITE_MODULES, read_module
from fxprop.ops.registered import registered_classes
from fxprop.plan.sites import Call, Operand, Site
from fxprop.tracing.module_kinds import DENSE_MODULES, holds_matrices, unsafe
from fxprop.tracing.observe.records import tensor_info
from fxprop.tracing.source_lines import source_line


def read_module_call(context: Context, node: fx.Node) -> Site | None:
    """The site at a call_module node, or None if its module holds no matrix."""
    name = context.name(str(node.target))
    if name in context.elsewhere:
        return None
    module = context.module.get_submodule(str(node.target))
    if isinstance(module, registered_classes()) and name not in context.reasons:
        return _read_registered(context, node, name, module)
    base = next((cls for cls in SITE_MODULES if isinstance(module, cls)), None)
    if base is None or name in context.reasons:
        reason = context.reasons.get(name)
        return opaque_module(name, module, node.name, context.path, source_line(node.stack_trace), reason)
    operator = SITE_MODULES[base]
    site = Site(
        name=name,
        op=operator.name,
        node=node.name,
        graph=context.path,
        types=type_names(type(module)),
        source=source_line(node.stack_trace),
    )
    reason = unsafe(module) or _unusual_call(node)
    if reason is not None:
        return replace(site, skip=reason)
    input_node = _only_argument(node)
    assert input_node is not None
    constants, pad = _constants(module, operator.attributes)
    target = str(node.target)
    has_bias = own_tensor(module, "bias") is not None
    call = Call(
        input=Operand(node=input_node.name),
        weight=Operand(attribute=f"{target}.weight"),
        bias=Operand(attribute=f"{target}.bias") if has_bias else None,
        constants=constants,
        pad=pad,
    )
    known = context.call.weights.get(node.name) if context.call else None
    if known is None:
        own = own_tensor(module, "weight")
        known = None if own is None else tensor_info(own)
    return with_shapes(site, context, node, call, known)


def _read_registered(context: Context, node: fx.Node, name: str, module: nn.Module) -> Site | None:
    product = read_module(module, node.args, node.kwargs)
    if product is None:
        return opaque_module(name, module, node.name, context.path, source_line(node.stack_trace))

    def operand(value: Any) -> Operand | None:
        if isinstance(value, str):
            return Operand(attribute=f"{node.target}.{value}")
        return Operand(node=value.name) if isinstance(value, fx.Node) else None

    input_, weight, bias = (operand(value) for value in (product.input, product.weight, product.bias))
    site = Site(
        name=name,
        op=product.op,
        node=node.name,
        graph=context.path,
        types=type_names(type(module)),
        source=source_line(node.stack_trace),
    )
    if input_ is None or weight is None:
        return replace(site, skip="its registered reader names no input or weight")
    call = Call(input_, weight, bias, dict(product.constants))
    own = getattr(module, product.weight, None) if isinstance(product.weight, str) else None
    known = tensor_info(own) if isinstance(own, torch.Tensor) else None
    return with_shapes(site, context, node, call, known)


def _unusual_call(node: fx.Node) -> str | None:
    if _only_argument(node) is None:
        return f"called with {len(node.args)} arguments and keywords {sorted(node.kwargs)}, not one input"
    return None


def _only_argument(node: fx.Node) -> fx.Node | None:
    values = [*node.args, *node.kwargs.values()]
    only_input = set(node.kwargs) <= {"input"} and len(values) == 1
    return values[0] if only_input and isinstance(values[0], fx.Node) else None


def _constants(
    module: nn.Module, attributes: tuple[str, ...]
) -> tuple[dict[str, Any], tuple[tuple[int, ...], str] | None]:
    constants = {name: getattr(module, name) for name in attributes}
    mode = getattr(module, "padding_mode", "zeros")
    if mode == "zeros":
        return constants, None
    # as nn.Conv*d._conv_forward: pad by hand, then convolve without padding. By the numbers that it keeps
    # for that, though they are private: it does not look at `module.padding`, which may be another by now
    pad: list[int] = vars(module)["_reversed_padding_repeated_twice"]
    constants["padding"] = (0,) * len(constants["stride"])
    return constants, (tuple(pad), str(mode))


def opaque_module(
    name: str, module: nn.Module, node: str, graph: str, source: str | None, reason: str | None = None
) -> Site | None:
    """A module kept as one call that holds matrices: listed, so that it is not silently absent."""
    if not holds_matrices(module):
        return None
    kind = type(module).__name__
    known = next((text for cls, text in DENSE_MODULES.items() if isinstance(module, cls)), None)
    reason = known or reason or f"{kind} is kept as one call; its FLOPs are in `other`"
    return Site(
        name=name,
        op=kind,
        node=node,
        graph=graph,
        types=type_names(type(module)),
        skip=reason,
        source=source,
    )
