"""What module classes are to fxprop: those with a sparse operator, and those known to stay dense."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

from fxprop.ops.catalogue import SITE_MODULES
from fxprop.ops.modules import hooks_of
from fxprop.ops.registered import is_registered, registered_classes

# in the metadata of a node that stands for the whole module whose graph it is in
IS_MODULE = "fxprop_is_module"

# these must be a class's own for the rewrite to know what a module of a class in `SITE_MODULES` computes
_SAFE_METHODS = ("forward", "_conv_forward", "__call__")

# why modules that hold matrices stay as they are
DENSE_MODULES: dict[type[nn.Module], str] = {
    nn.Embedding: "a lookup without multiply-adds: nothing to save",
    nn.EmbeddingBag: "a lookup without multiply-adds: nothing to save",
    nn.RNNBase: "a recurrent layer is one fused kernel; its FLOPs are in `other`",
    nn.RNNCellBase: "a recurrent cell is one fused kernel; its FLOPs are in `other`",
    nn.Bilinear: "bilinear has no sparse operator; its FLOPs are in `other`",
}


# what a trace keeps as one call besides; by name, as the classes that they have in common are private
NORMS_WITH_STATISTICS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
NORMS = (*NORMS_WITH_STATISTICS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
DROPOUTS: tuple[type[nn.Module], ...] = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def is_readable(module: nn.Module) -> bool:
    """Whether a call of `module` can be read as a site as it stands."""
    if isinstance(module, registered_classes()):
        return True
    return isinstance(module, tuple(SITE_MODULES)) and unsafe(module) is None


def unsafe(module: nn.Module) -> str | None:
    """Why `module` may compute something else than its class says; None if it does not."""
    cls = type(module)
    base = next(c for c in SITE_MODULES if isinstance(module, c))
    for method in _SAFE_METHODS:
        here = getattr(cls, method, None)
        if here is not getattr(base, method, None) or method in vars(module):
            return f"{cls.__name__} overrides {method} of nn.{base.__name__}"
    hooks = hooks_of(module)
    if hooks:
        return (
            f"the module has {', '.join(hooks)}, which a function call would not run "
            "(weight_norm and spectral_norm: use torch.nn.utils.parametrizations)"
        )
    if any(map(is_lazy, own_parameters(module).values())):
        return "a lazy module without parameters yet: run the model once on real inputs first"
    return None


def holds_matrices(module: nn.Module) -> bool:
    """Whether something in `module` could be multiplied by."""
    return any(p.dim() >= 2 or is_lazy(p) for p in module.parameters())


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `module` holds itself, not those of modules in it, by their names there."""
    # nn.Module's own: what users put in its place may take less, or give other names
    return dict(nn.Module.named_parameters(module, recurse=False, remove_duplicate=False))


def is_users(function: Any) -> bool:
    """Whether a function comes from outside torch and Python, as those marked with torch.fx.wrap do."""
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    if is_registered(function):
        return False
    if function is F.multi_head_attention_forward:
        return True  # holds products of its own, as users' functions may
    known = ("", "torch", "_operator", "operator", "builtins", "math", "collections", "fxprop")
    return package not in known
