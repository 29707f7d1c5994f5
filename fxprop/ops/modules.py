"""Whether a module computes what its class says, and nothing besides."""

from __future__ import annotations

from torch import nn

# private, but there is no public way to see hooks, and a call that skips them computes something else
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooks_of(module: nn.Module) -> list[str]:
    """The kinds of hooks on `module`: ["forward_hooks"]."""
    return [kind.strip("_") for kind in HOOKS if getattr(module, kind, None)]


def is_plain(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether `module` is of one of these very classes, without hooks or a forward of its own."""
    return type(module) in classes and not hooks_of(module) and "forward" not in vars(module)
