"""The classes that fx makes, each for one module, to hold its generated code."""

from __future__ import annotations

import abc
from typing import Any

from torch import fx, nn

# the name by which fx knows the classes that it makes; private, but fx looks for no other mark
_MADE_BY_FX = "GraphModuleImpl"


def make_class(name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> Any:
    """A new class for one module, unseen by registries that metaclasses of its bases keep.

    (The first of `bases` has an `__init_subclass__` that does nothing, as a user's might want arguments.)
    """
    metaclass: Any = type
    for base in bases:
        metaclass = type(base) if issubclass(type(base), metaclass) else metaclass
    maker = abc.ABCMeta if issubclass(metaclass, abc.ABCMeta) else type
    return maker.__new__(metaclass, name, bases, attributes)


def make_fx_class(name: str, bases: tuple[type, ...]) -> Any:
    """A new class that fx takes for one that it made for one module."""
    return make_class(name, bases, {"__qualname__": _MADE_BY_FX})


def set_mode(module: nn.Module, training: bool) -> None:
    """Put `module` in a mode by its own methods, which may do more."""
    module.train() if training else module.eval()


def is_generated(cls: type) -> bool:
    """Whether fx made `cls` for one module."""
    return cls.__qualname__.rpartition(".")[2] == _MADE_BY_FX


def generated_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that fx made for one module, among the bases of `cls` or itself."""
    return next(base for base in cls.__mro__ if is_generated(base))


def sibling(cls: type[nn.Module]) -> type[nn.Module]:
    """Another class for the code of another graph of the same module."""
    generated = generated_class(cls)
    made: type[nn.Module] = make_fx_class(generated.__name__, generated.__bases__)
    return made


def in_place_of(cls: type[nn.Module], generated: type[nn.Module]) -> type[nn.Module]:
    """`generated`, under whatever class was put on top of the present one."""
    present = generated_class(cls)
    if cls is present:
        return generated
    tops: dict[str, type[nn.Module]] = generated.__dict__.get("_tops", {})
    if cls.__name__ not in tops:
        bases = tuple(generated if base is present else base for base in cls.__bases__)
        own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        tops[cls.__name__] = make_class(cls.__name__, bases, own)
        generated._tops = tops  # type: ignore[attr-defined]
    return tops[cls.__name__]


def imports_of(graph: fx.Graph) -> list[str]:
    """The import lines for the functions and classes that the graph's code calls by a name of its own."""
    lines = []
    for name, value in graph.python_code("self").globals.items():
        module, own_name = getattr(value, "__module__", None), getattr(value, "__name__", None)
        # fx itself writes the imports for torch, device and the like
        if module not in (None, "builtins", "torch") and own_name:
            lines.append(f"from {module} import {own_name} as {name}")
    return lines
