"""Hooks on modules: who has them, which modules must stay modules, and which hooks will never run."""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from fxprop.errors import TraceError
from fxprop.ops.modules import HOOKS, hooks_of


def registries(module: nn.Module) -> dict[str, Mapping[int, Any]]:
    """The dictionaries in which `module` keeps its hooks, by their kind."""
    return {kind: getattr(module, kind) for kind in HOOKS}


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether torch's `fully_shard` was put on `module`, whose hooks then gather its parameters."""
    # not imported, which takes a second: whoever has such a module has imported it
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def names_to_preserve(model: nn.Module, asked_for: Iterable[type[nn.Module] | str]) -> frozenset[str]:
    """The names of the modules in `model` that must go on being called as modules.

    >>> names_to_preserve(resnet18, ["layer?.*", nn.MaxPool2d])

    Those with hooks, and those asked for by class or by a glob on the name; TraceError names the near
    misses of what matches none.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    names = {name for name, module in modules.items() if hooks_of(module)}
    for wanted in asked_for:
        if isinstance(wanted, str):
            matching = fnmatch.filter(modules, wanted)
            near = difflib.get_close_matches(wanted, modules, cutoff=0.4)
        else:
            matching = [name for name, module in modules.items() if isinstance(module, wanted)]
            near = sorted({type(module).__name__ for module in modules.values()})
        if not matching:
            raise TraceError(
                f"preserve_modules: {wanted!r} matches no module of {type(model).__name__}. "
                f"Nearest: {', '.join(near) or 'none'}."
            )
        names.update(matching)
    return frozenset(names)


def find_uncalled_hooks(root: nn.Module, graph: fx.Graph) -> dict[tuple[str, str], Mapping[int, Any]]:
    """The hooks on modules in `root` that `graph` does not call: (name, kind) -> hooks."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}

    def below(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:depth]) in called for depth in range(1, len(parts) + 1))

    modules = [(name, module) for name, module in root.named_modules() if name and not below(name)]
    return {(name, kind): hooks for name, module in modules for kind, hooks in registries(module).items()}
