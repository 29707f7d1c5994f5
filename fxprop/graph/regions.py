"""Which nodes behind a layer can be rewritten with it: batch-norm and ReLU, or an activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprop.frontends.hooks import hooks_of
from fxprop.graph.site import Context
from fxprop.ops.conv_norm import NORMS
from fxprop.plan import Activation, Region, Site

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
# a function, a method's name or a module class -> the activation; gelu is one of two
_ACTIVATIONS: dict[object, Activation] = {
    **dict.fromkeys((*_RELU, nn.ReLU), "relu"),
    **dict.fromkeys((F.gelu, nn.GELU), "gelu"),
    **dict.fromkeys((F.silu, nn.SiLU), "silu"),
}
_GELUS: dict[object, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}


def region_of(context: Context, node: fx.Node, site: Site) -> Region | None:
    """The region that begins with the convolution or linear layer at `node`; None if nothing fits.

    Each node must be the only user of the one before it. Modules with hooks are left out: they would not
    be called.
    """
    if site.skip is not None:
        return None
    following = _only_user(node)
    if following is None:
        return None
    if site.op == "linear":
        activation = _activation(context, following)
        return None if activation is None else Region(None, activation, (following.name,))
    if site.op not in ("conv1d", "conv2d", "conv3d"):
        return None
    if not _is_plain(context, following, NORMS) or not _takes_one(following):
        return None
    target = str(following.target)
    relu = _only_user(following)
    if relu is not None and _activation(context, relu) == "relu":
        return Region(target, "relu", (following.name, relu.name))
    return Region(target, None, (following.name,))


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_plain(context: Context, node: fx.Node, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether `node` calls a module that is just what its class says."""
    if node.op != "call_module" or context.name(str(node.target)) in context.reasons:
        return False
    module = context.module.get_submodule(str(node.target))
    return type(module) in classes and not hooks_of(module) and "forward" not in vars(module)


def _activation(context: Context, node: fx.Node) -> Activation | None:
    """Which activation `node` computes; None if another, or one that was changed."""
    if node.op == "call_module":
        if not _is_plain(context, node, (nn.ReLU, nn.GELU, nn.SiLU)) or not _takes_one(node):
            return None
        module = context.module.get_submodule(str(node.target))
        found, approximate = _ACTIVATIONS[type(module)], getattr(module, "approximate", "none")
    elif node.op in ("call_function", "call_method") and len(node.args) == 1:
        if node.target not in _ACTIVATIONS or not set(node.kwargs) <= {"inplace", "approximate"}:
            return None
        found, approximate = _ACTIVATIONS[node.target], node.kwargs.get("approximate", "none")
    else:
        return None
    return _GELUS.get(approximate) if found == "gelu" else found


def _takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs
