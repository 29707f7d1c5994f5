"""Which nodes behind a convolution can be rewritten with it: a batch-norm module, then ReLU or nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprop.graph.site import Context
from fxprop.ops.conv_norm import NORMS
from fxprop.plan import Region, Site

_RELU = frozenset((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"))


def region_of(context: Context, node: fx.Node, site: Site) -> Region | None:
    """The region that begins with the convolution at `node`; None if nothing fits.

    Each node must be the only user of the one before it. Modules with hooks are left out: they would not
    be called.
    """
    if site.op not in ("conv1d", "conv2d", "conv3d") or site.skip is not None:
        return None
    norm = _only_user(node)
    if norm is None or not _is_plain(context, norm, NORMS) or not _takes_one(norm):
        return None
    target = str(norm.target)
    relu = _only_user(norm)
    if relu is not None and _is_relu(context, relu):
        return Region(target, "relu", (norm.name, relu.name))
    return Region(target, None, (norm.name,))


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_plain(context: Context, node: fx.Node, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether `node` calls a module that is just what its class says."""
    if node.op != "call_module" or context.name(str(node.target)) in context.reasons:
        return False
    module = context.module.get_submodule(str(node.target))
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) in classes and not any(hooks) and "forward" not in vars(module)


def _is_relu(context: Context, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_plain(context, node, (nn.ReLU,)) and _takes_one(node)
    return node.op in ("call_function", "call_method") and node.target in _RELU


def _takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs
