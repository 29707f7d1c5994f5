"""What Python objects hold, and which of them are a model's own.

The walks over a model's objects (copies of its tree, snapshots of its state) share what is said here.
"""

from __future__ import annotations

import abc
import collections
import enum
import functools
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any, Generic, Protocol

import torch
from torch import nn

# classes of Python's whose instances are plain holders of values
_HOLDERS = (types.SimpleNamespace, collections.UserDict, collections.UserList, threading.local)
# bases that add no state of their own
_PLAIN = (object, abc.ABC, Generic, Protocol)
# packages whose objects hold a model, and much else
_FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "deepspeed"}
_LIBRARIES = {"torch", "numpy", "fxprop", "_pytest", "pytest", "hypothesis", *sys.stdlib_module_names}
# how many objects walks look at, the nearest first: a model's own are far fewer, a data set's may be more
MANY = 20_000
CACHED = type(functools.lru_cache(lambda: None))


def package_of(value: Any) -> str:
    """The top-level package in which a class, function or module is defined."""
    name = getattr(value, "__module__", None) if not isinstance(value, types.ModuleType) else value.__name__
    return name.partition(".")[0] if isinstance(name, str) else ""


def is_users(value: Any) -> bool:
    """Whether a class, function or module is neither torch's, nor Python's, nor fxprop's."""
    return package_of(value) not in _LIBRARIES


def is_holder(value: Any) -> bool:
    """Whether `value` is a plain object of a user's: one whose attributes are all there is to it."""
    cls = type(value)
    known = _holders.get(cls)
    if known is None:
        known = _holders[cls] = _is_of_holders(cls)
    return known and (hasattr(value, "__dict__") or bool(slots_of(cls)))


# classes that were looked at before: walks meet the same ones thousands of times
_holders: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
_slots: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _is_of_holders(cls: type) -> bool:
    if issubclass(cls, type | types.ModuleType | types.FunctionType | nn.Module | enum.Enum):
        return False
    if issubclass(cls, _HOLDERS):
        return True
    # a class of C's among its bases would keep more than attributes
    plain = all(is_users(base) or base in _PLAIN for base in cls.__mro__)
    return plain and is_users(cls) and package_of(cls) not in _FRAMEWORKS


def is_iterator(value: Any) -> bool:
    """Whether `value` is an iterator of Python's own, which counts where it is."""
    known = type(value).__module__ in ("builtins", "itertools")
    return known and isinstance(value, Iterator) and not isinstance(value, types.GeneratorType)


def slots_of(cls: type) -> tuple[str, ...]:
    """The names of the `__slots__` of a class, as they are looked up."""
    known = _slots.get(cls)
    if known is None:
        known = _slots[cls] = tuple(_slots_of(cls))
    return known


def _slots_of(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                yield f"_{base.__name__.lstrip('_')}{name}" if private else name


def slot_values(value: Any) -> Iterator[tuple[str, Any]]:
    """The slots of `value` that are filled, with what is in them."""
    for name in slots_of(type(value)):
        try:
            yield name, getattr(value, name)
        except AttributeError:
            continue


def cell_value(cell: types.CellType) -> Any:
    """What a closure's cell holds; None if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


# of these and their like a model holds thousands, and they lead to nothing
ATOMS = frozenset((bool, int, float, complex, str, bytes, type(None), torch.Tensor, nn.Parameter))


def held_by(value: Any) -> list[Any]:
    """The objects that `value` leads to, as far as copies and snapshots follow them; no atoms."""
    return [held for held in _held_by(value) if type(held) not in ATOMS]


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        own = [held for key, held in vars(value).items() if key != "_compiled_call_impl"]
        return [*own, *(held for _, held in slot_values(value))]
    if isinstance(value, dict | list | tuple | set | frozenset | collections.deque):
        items = value.values() if isinstance(value, dict) else value
        return list(items) if len(value) <= MANY else []
    if isinstance(value, types.FunctionType):
        cells = [cell_value(cell) for cell in value.__closure__ or ()]
        named = [*(value.__kwdefaults__ or {}).values(), *vars(value).values()]
        return [*cells, *(value.__defaults__ or ()), *named]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if type(value) in (weakref.ref, weakref.WeakMethod):
        return [value()]
    if type(value) is CACHED:
        return [value.__wrapped__]
    if is_holder(value):
        return [*getattr(value, "__dict__", {}).values(), *(held for _, held in slot_values(value))]
    return []
