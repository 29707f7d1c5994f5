"""Hooks on modules: who has them, which modules must stay modules, and which hooks will never run."""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from fxprop.errors import TraceError
from fxprop.ops.modules import HOOKS, hooks_of


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


def called_modules(graph: fx.Graph) -> list[str]:
    """The name of the module in each call of one in `graph`."""
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def modules_in_code(root: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) for each in `root` that `graph` does not call, and that is in none that it calls."""
    called = set(called_modules(graph))
    for name, module in root.named_modules():
        parts = name.split(".") if name else []
        if not any(".".join(parts[:depth]) in called for depth in range(1, len(parts) + 1)):
            yield name, module


def find_uncalled_hooks(root: nn.Module, graph: fx.Graph) -> dict[tuple[str, str], Mapping[int, Any]]:
    """The hooks on modules in `root` that `graph` does not call: (name, kind) -> hooks."""
    modules = [(name, module) for name, module in modules_in_code(root, graph) if name]
    return {(name, kind): getattr(module, kind) for name, module in modules for kind in HOOKS}
