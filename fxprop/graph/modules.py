"""Reading module calls: nn.Conv1d/2d/3d and nn.Linear to sites, anything unsafe to a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fxprop.frontends.shapes import tensor_info
from fxprop.graph.site import GEOMETRY, Context, source_line, with_shapes
from fxprop.plan import Call, Operand, Site

# Module classes with a sparse operator. `_SAFE_METHODS` must be the class's own for the rewrite to know
# what the module computes.
_MODULES: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
}
_SAFE_METHODS = ("forward", "_conv_forward", "__call__")


def read_module_call(context: Context, node: fx.Node) -> Site | None:
    """The site at a call_module node, or None if its module holds no matrix."""
    module = context.traced.get_submodule(str(node.target))
    op = next((op for cls, op in _MODULES.items() if isinstance(module, cls)), None)
    return _opaque_module(node, module) if op is None else _site(context, node, module, op)


def _site(context: Context, node: fx.Node, module: nn.Module, op: str) -> Site:
    name = str(node.target)
    types = tuple(c.__name__ for c in type(module).__mro__ if issubclass(c, nn.Module))[:-1]
    types = tuple(t for t in types if not t.startswith("_"))
    site = Site(name=name, op=op, node=node.name, types=types, source=source_line(node))
    reason = _unsafe(module) or _unusual_call(node)
    if reason is not None:
        return replace(site, skip=reason)
    weight, bias = f"{name}.weight", f"{name}.bias"
    geometry, pad = _module_geometry(module, op)
    input_node = _only_argument(node)
    assert input_node is not None
    call = Call(
        input=Operand(node=input_node.name),
        weight=Operand(attribute=weight),
        bias=Operand(attribute=bias) if _own_tensor(module, "bias") is not None else None,
        geometry=geometry,
        pad=pad,
    )
    known = context.run.weights.get(node.name) if context.run else None
    if known is None:
        own = _own_tensor(module, "weight")
        known = None if own is None else tensor_info(own)
    return with_shapes(replace(site, call=call), context, node, known, geometry.get("groups", 1))


def _unsafe(module: nn.Module) -> str | None:
    """Why `module` may compute something else than its class says; None if it does not."""
    cls = type(module)
    base = next(c for c in _MODULES if isinstance(module, c))
    for method in _SAFE_METHODS:
        here = getattr(cls, method, None)
        if here is not getattr(base, method, None) or method in vars(module):
            return f"{cls.__name__} overrides {method} of nn.{base.__name__}"
    hooks = [kind for kind in _HOOKS if getattr(module, kind, None)]
    if hooks:
        kinds = ", ".join(kind.strip("_") for kind in hooks)
        return (
            f"the module has {kinds}, which a function call would not run "
            "(weight_norm and spectral_norm: use torch.nn.utils.parametrizations)"
        )
    if any(is_lazy(p) for p in vars(module)["_parameters"].values() if p is not None):
        return "a lazy module without parameters yet: run the model once on real inputs first"
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _unusual_call(node: fx.Node) -> str | None:
    if _only_argument(node) is None:
        return f"called with {len(node.args)} arguments and keywords {sorted(node.kwargs)}, not one input"
    return None


def _only_argument(node: fx.Node) -> fx.Node | None:
    values = [*node.args, *node.kwargs.values()]
    only_input = set(node.kwargs) <= {"input"} and len(values) == 1
    return values[0] if only_input and isinstance(values[0], fx.Node) else None


def _own_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter `name`, or what it is computed from where it is parametrized.

    A parametrization is not evaluated, which may have effects; in every one of torch's own the largest of
    its originals has the weight's shape.
    """
    if parametrize.is_parametrized(module, name):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        return max(lists[name].parameters(recurse=False), key=torch.numel, default=None)
    parameter = vars(module)["_parameters"].get(name)
    return parameter if isinstance(parameter, torch.Tensor) else None


def _module_geometry(
    module: nn.Module, op: str
) -> tuple[dict[str, Any], tuple[tuple[int, ...], str] | None]:
    if op == "linear":
        return {}, None
    geometry = {name: getattr(module, name) for name in GEOMETRY}
    mode = module.padding_mode
    if mode == "zeros":
        return geometry, None
    # as nn.Conv*d._conv_forward: pad by hand, then convolve without padding
    pad: list[int] = vars(module)["_reversed_padding_repeated_twice"]
    geometry["padding"] = (0,) * len(geometry["stride"])
    return geometry, (tuple(pad), str(mode))


def _opaque_module(node: fx.Node, module: nn.Module) -> Site | None:
    """A module kept as one call that holds matrices: listed, so that it is not silently absent."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None  # a lookup: no multiply-adds
    if not any(p.dim() >= 2 for p in module.parameters()):
        return None
    name = type(module).__name__
    reason = f"{name} is kept as one call; its weights are not reached, its FLOPs are in `other`"
    return Site(
        name=str(node.target), op=name, node=node.name, types=(name,), skip=reason, source=source_line(node)
    )
