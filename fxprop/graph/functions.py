"""Reading function calls: F.conv1d/2d/3d and F.linear (and their aten forms) to sites.

Arguments are bound by name. Other calls that use a matrix parameter are listed with the reason why they
stay as they are.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxprop.frontends.module import TracedModule
from fxprop.frontends.shapes import TensorInfo, tensor_info
from fxprop.graph.site import Context, call_name, source_line, with_shapes
from fxprop.plan import Call, Operand, Site

# Functions with a sparse operator; torch.nn.functional's are the same objects as torch's, and exported
# graphs hold the aten overloads.
_FUNCTIONS: dict[Any, str] = {
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.linear: "linear",
    torch.ops.aten.conv1d.default: "conv1d",
    torch.ops.aten.conv1d.padding: "conv1d",
    torch.ops.aten.conv2d.default: "conv2d",
    torch.ops.aten.conv2d.padding: "conv2d",
    torch.ops.aten.conv3d.default: "conv3d",
    torch.ops.aten.conv3d.padding: "conv3d",
    torch.ops.aten.linear.default: "linear",
}

_NO_VALUE = inspect.Parameter.empty


def _signature(**defaults: Any) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
            for name, default in defaults.items()
        ]
    )


# the functions are builtins without a signature of their own
_CONV_SIGNATURE = _signature(
    input=_NO_VALUE, weight=_NO_VALUE, bias=None, stride=1, padding=0, dilation=1, groups=1
)
_LINEAR_SIGNATURE = _signature(input=_NO_VALUE, weight=_NO_VALUE, bias=None)

# Multiplications by a parameter that have no sparse operator: by name, for functions, methods and aten
_PRODUCTS = {
    *("matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "addmv", "mv", "dot", "einsum", "tensordot"),
    *("bilinear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "conv_tbc"),
}


def read_call(context: Context, node: fx.Node) -> Site | None:
    """The site at a call_function or call_method node, or None if it multiplies by no weight."""
    op = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    return _opaque(context, node) if op is None else _site(context, node, op)


def _site(context: Context, node: fx.Node, op: str) -> Site:
    signature = _LINEAR_SIGNATURE if op == "linear" else _CONV_SIGNATURE
    bound = signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    input_, weight, bias = (arguments.pop(name) for name in ("input", "weight", "bias"))
    site = Site(name=_function_name(node, weight), op=op, node=node.name, source=source_line(node))
    if not isinstance(input_, fx.Node) or not isinstance(weight, fx.Node):
        return replace(site, skip="input or weight is a constant of the graph")
    computed = [name for name, value in arguments.items() if _mentions_node(value)]
    if computed:
        return replace(site, skip=f"{', '.join(computed)} is computed in the graph")
    call = Call(
        input=Operand(node=input_.name),
        weight=Operand(node=weight.name),
        bias=Operand(node=bias.name) if isinstance(bias, fx.Node) else None,
        geometry=dict(arguments),
    )
    known = context.run.outputs.get(weight.name) if context.run else None
    if known is None and weight.op == "get_attr":
        known = _attribute_info(context.traced, str(weight.target))
    if known is None:
        return replace(site, skip="the shape of its computed weight is known only with example_inputs")
    groups = arguments.get("groups", 1)
    if known.shape[0] == 0 or len(known.shape) < 2 or known.shape[0] % groups:
        return replace(site, skip=f"weight of shape {known.shape} with groups={groups}")
    return with_shapes(replace(site, call=call), context, node, known, groups)


def _function_name(node: fx.Node, weight: Any) -> str:
    """The weight's module path, with the weight's own name if that is not "weight"."""
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return str(weight.target).removesuffix(".weight") or node.name
    return node.name


def _mentions_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)


def _attribute_info(traced: TracedModule, target: str) -> TensorInfo | None:
    path, _, attribute = target.rpartition(".")
    owner = traced.get_submodule(path)
    tensors = {**vars(owner), **vars(owner)["_parameters"], **vars(owner)["_buffers"]}
    tensor = tensors.get(attribute)  # a property is left alone: evaluating it may have effects
    if not isinstance(tensor, torch.Tensor):
        return None
    return tensor_info(tensor)


def _opaque(context: Context, node: fx.Node) -> Site | None:
    """A call that uses a matrix parameter in a way that has no sparse operator."""
    name = call_name(node.target)
    weights = [n for n in node.all_input_nodes if n.op == "get_attr" and _is_matrix(context, n)]
    if not weights:
        return None  # an activation product, such as attention's: nothing to name
    if name in _PRODUCTS:
        reason = f"{name} with a parameter has no sparse operator; its FLOPs are in `other`"
    elif node.op == "call_function" and _is_users(node.target):
        names = ", ".join(str(weight.target) for weight in weights)
        reason = f"function {name} is kept as one call and uses {names}; its FLOPs are in `other`"
    else:
        return None
    return Site(
        name=_function_name(node, weights[0]),
        op=name,
        node=node.name,
        skip=reason,
        source=source_line(node),
    )


def _is_matrix(context: Context, node: fx.Node) -> bool:
    info = _attribute_info(context.traced, str(node.target))
    return info is None or len(info.shape) >= 2


def _is_users(function: Any) -> bool:
    """Whether a function comes from outside torch and Python, as those marked with torch.fx.wrap do."""
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    return package not in (
        "",
        "torch",
        "_operator",
        "operator",
        "builtins",
        "math",
        "collections",
        "fxprop",
    )
