"""What a graph takes for granted of the Python around it, so that a change is noticed at the next call.

A graph holds the values that its model's code read while it was traced: attributes, global variables,
which child is where. Each becomes a triple (function, argument, value): as long as `function(argument) is
value`, nothing has changed. They are checked at every call, so the functions are ones of C's.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprop.ops.catalogue import SITE_MODULES
from fxprop.tracing.hooks import called_modules, modules_in_code
from fxprop.tracing.objects import cell_value, is_holder, is_users
from fxprop.tracing.reach import Reach

Assumption = tuple[Callable[[Any], Any], Any, Any]

_NOT_READ = ("training", "_parameters", "_buffers", "_modules", "_is_full_backward_hook")
# containers with more entries are data, not settings
_MANY = 64


def assumptions(root: nn.Module, graph: fx.Graph, reach: Reach) -> list[Assumption]:
    """What `graph`, of the code of `root`, takes for granted; without what it fetches when it runs.

    `reach` is that of `root`.
    """
    values, called = _Values(reach.names), set(called_modules(graph))
    for name, module in modules_in_code(root, graph):
        values.of_module(name, module, called)
    for cls in reach.classes.values():
        values.of_mapping(vars(cls))
    for namespace, name in reach.variables.values():
        values.add(namespace.get, name, namespace[name])
    for cell in reach.cells.values():
        values.contents(cell_value(cell))
    return values.triples


def modes(root: nn.Module, graph: fx.Graph, training: Callable[[str], bool]) -> list[Assumption]:
    """That every module whose code is in `graph` is in the mode that `training` says of its name."""
    return [
        (vars(module).get, "training", training(name))
        for name, module in modules_in_code(root, graph)
        if name and _has_users_code(module)
    ]


def holds(assumption: Assumption) -> bool:
    """Whether the value is still the same, or an equal one."""
    function, argument, value = assumption
    try:
        now = function(argument)
        plain = isinstance(now, bool | int | float | str | tuple) and type(now) is type(value)
        return now is value or (plain and bool(now == value))
    except Exception:
        return False


def describe_assumption(assumption: Assumption) -> str:
    """In words, what a broken assumption is about."""
    function, argument, value = assumption
    if isinstance(value, nn.Module):
        return f"the child {argument!r}"
    name = getattr(function, "__name__", "")
    return {"__eq__": "a list that its code reads", "len": "how many there are of something"}.get(
        name, f"{argument!r}"
    )


class _Values:
    def __init__(self, names: set[str]) -> None:
        self._names = names
        self.triples: list[Assumption] = []
        self._seen: dict[int, Any] = {}

    def add(self, function: Callable[[Any], Any], argument: Any, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            return
        if not isinstance(value, type) and not callable(value):
            self.contents(value)
        self.triples.append((function, argument, value))

    def of_module(self, name: str, module: nn.Module, called: set[str]) -> None:
        attributes = vars(module)
        # one of its own would be called in place of the class's; added to a list, a child would be called
        beside = {*attributes, "forward"}
        if name:
            self.triples.append((attributes.get, "forward", attributes.get("forward")))
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            self.triples.append((len, attributes["_modules"], len(attributes["_modules"])))
        for cls in type(module).__mro__ if _has_users_code(module) else ():
            if is_users(cls):
                for key in (self._names & vars(cls).keys()) - beside:
                    self.triples.append((attributes.get, key, None))
        for key in _read_of(module, self._names):
            self.add(attributes.get, key, attributes[key])
        for key, child in attributes["_modules"].items():
            if ".".join(filter(None, (name, key))) not in called:
                self.triples.append((attributes["_modules"].get, key, child))
        for key, parameter in attributes["_parameters"].items():
            if parameter is None:
                self.triples.append((attributes["_parameters"].get, key, None))

    def of_mapping(self, mapping: Mapping[str, Any]) -> None:
        for key, value in list(mapping.items()):
            if key in self._names:
                self.add(mapping.get, key, value)

    def contents(self, value: Any) -> None:
        """What a container or a plain object holds."""
        if id(value) in self._seen or isinstance(value, nn.Module | torch.Tensor):
            return
        self._seen[id(value)] = value
        if isinstance(value, dict) and len(value) <= _MANY:
            self.triples.append((len, value, len(value)))
            for key, held in list(dict.items(value)):
                self.add(value.get, key, held)
        elif isinstance(value, list) and len(value) <= _MANY:
            self.triples.append((list(value).__eq__, value, True))
        elif is_holder(value):
            attributes = getattr(value, "__dict__", {})
            self.triples.append((len, attributes, len(attributes)))
            self.of_mapping(attributes)


def _has_users_code(module: nn.Module) -> bool:
    return any(is_users(cls) for cls in type(module).__mro__)


def _read_of(module: nn.Module, names: set[str]) -> Iterator[str]:
    """The attributes of `module` whose values are in a graph of its code."""
    constants = next((of.attributes for cls, of in SITE_MODULES.items() if isinstance(module, cls)), None)
    users = _has_users_code(module)
    for key, value in list(vars(module).items()):
        if constants is not None and not users:
            read = key in constants or key == "padding_mode"
        elif users:
            read = key in names
        else:
            read = not key.startswith("_") and isinstance(value, bool | int | float | str | tuple | None)
        if read and key not in _NOT_READ and not key.startswith("_fx"):
            yield key
