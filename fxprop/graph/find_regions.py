"""Which nodes behind a layer can be rewritten with it, by the table of regions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprop.graph.context import Context
from fxprop.ops.modules import is_plain
from fxprop.ops.regions.table import REGIONS, RegionKind
from fxprop.plan.sites import Region, Site

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
# a function, a method's name or a module class -> the activation; gelu is one of two
_ACTIVATIONS: dict[object, str] = {
    **dict.fromkeys((*_RELU, nn.ReLU), "relu"),
    **dict.fromkeys((F.gelu, nn.GELU), "gelu"),
    **dict.fromkeys((F.silu, nn.SiLU), "silu"),
}
_GELUS: dict[object, str] = {"none": "gelu", "tanh": "gelu_tanh"}


def region_of(context: Context, node: fx.Node, site: Site) -> Region | None:
    """The longest region of the table that begins with the layer at `node`; None if nothing fits.

    Each node must be the only user of the one before it. Modules with hooks are left out: they would not
    be called.
    """
    if site.skip is not None:
        return None
    kinds = (kind for kind in REGIONS.values() if site.op in kind.operators)
    regions = (_fit(context, node, kind) for kind in kinds)
    return max((region for region in regions if region), key=lambda region: len(region.nodes), default=None)


def _fit(context: Context, node: fx.Node, kind: RegionKind) -> Region | None:
    norm = None
    last = node
    if kind.norms:
        norm = _only_user(node)
        if norm is None or not _is_plain(context, norm, kind.norms) or not _takes_one(norm):
            return None
        last = norm
    following = _only_user(last)
    activation = None if following is None else _activation(context, following)
    nodes = [] if norm is None else [norm.name]
    if following is not None and activation is not None and activation in kind.activations:
        nodes.append(following.name)
    elif None in kind.activations:
        activation = None
    else:
        return None
    if norm is None:
        return Region(kind.name, activation, tuple(nodes))
    module = context.module.get_submodule(str(norm.target))
    return Region(
        *(kind.name, activation, tuple(nodes), str(norm.target)),
        *(type(module), kind.norm_arguments(module)),
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_plain(context: Context, node: fx.Node, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether `node` calls a module that is just what its class says."""
    if node.op != "call_module" or context.name(str(node.target)) in context.reasons:
        return False
    return is_plain(context.module.get_submodule(str(node.target)), classes)


def _activation(context: Context, node: fx.Node) -> str | None:
    """Which activation `node` computes; None if another, or one that was changed."""
    if node.op == "call_module":
        if not _is_plain(context, node, (nn.ReLU, nn.GELU, nn.SiLU)) or not _takes_one(node):
            return None
        module = context.module.get_submodule(str(node.target))
        name, approximate = _ACTIVATIONS[type(module)], getattr(module, "approximate", "none")
    elif node.op in ("call_function", "call_method") and len(node.args) == 1:
        if node.target not in _ACTIVATIONS or not set(node.kwargs) <= {"inplace", "approximate"}:
            return None
        name, approximate = _ACTIVATIONS[node.target], node.kwargs.get("approximate", "none")
    else:
        return None
    return _GELUS.get(approximate) if name == "gelu" else name


def _takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs
