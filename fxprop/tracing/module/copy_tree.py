"""A copy of a module tree that shares its tensors.

fxprop works on such a copy, so that whatever tracing, switching of modes or user code does to a module
lands there and never on the model that was passed in.
"""

from __future__ import annotations

import collections
import copy
import functools
import random
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxprop.tracing.compiled_parts import IN_PLACE, compiled_again, is_compiled, original_of
from fxprop.tracing.module.generated_class import is_generated, sibling
from fxprop.tracing.objects import (
    ATOMS,
    CACHED,
    MANY,
    cell_value,
    held_by,
    is_holder,
    is_iterator,
    is_users,
    slot_values,
)


def copy_tree(root: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> nn.Module:
    """A new module of the same classes, with `tensor(t)` in place of each tensor t (default: t itself).

    >>> twin = copy_tree(model)
    >>> twin.fc is model.fc, twin.fc.weight is model.fc.weight
    (False, True)

    References between modules point into the copy, also those in lists, dicts, plain objects of the
    model's own, bound methods, closures and weak references. Whatever else a module holds is shared. A
    tensor or module met twice is mapped once.
    """
    copier = _Copier(root, tensor)
    twin = copier.module(root)
    for made in copier.generated:  # the class of the original is for that one alone
        getattr(made, "fx_after_copy", made.recompile)()
    return twin


class _Copier:
    def __init__(self, root: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._tensor = tensor
        self.generated: list[Any] = []
        self._done: dict[int, Any] = {}
        # keeps the originals alive, so that an id in `_done` cannot be reused
        self._seen: list[Any] = []
        self._root = root

    @functools.cached_property
    def _lead(self) -> set[int]:
        return _leading_to_modules(self._root)

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._done and is_compiled(module):
            self._remember(module, compiled_again(module, self.module(original_of(module))))
        if id(module) not in self._done:
            generated = is_generated(type(module))
            twin: Any = object.__new__(sibling(type(module)) if generated else type(module))
            self._remember(module, twin)
            twin.__dict__.update({key: self.value(v) for key, v in vars(module).items() if key != IN_PLACE})
            for name, value in slot_values(module):
                object.__setattr__(twin, name, self.value(value))
            if generated:
                self.generated.append(twin)
        twin = self._done[id(module)]
        assert isinstance(twin, nn.Module)
        return twin

    def value(self, value: Any) -> Any:
        if type(value) in ATOMS and not isinstance(value, torch.Tensor):
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, torch.Tensor):
            return self._remember(value, self._tensor(value))
        if isinstance(value, dict):
            return self._dict(value)
        if type(value) in (list, set, collections.deque):
            twin = self._remember(value, value.copy())
            copies = [self.value(item) for item in value]
            twin.clear()
            twin.update(copies) if isinstance(twin, set) else twin.extend(copies)
            return twin
        if isinstance(value, tuple):
            items = tuple(self.value(item) for item in value)
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        # the look through the whole tree is for what is in few models
        if held_by(value) and id(value) in self._lead:
            return self._through(value)
        return self._of_its_own(value)

    def _of_its_own(self, value: Any) -> Any:
        """What draws numbers or counts for its module does so for each copy by itself."""
        if isinstance(value, torch.Generator):
            return self._remember(value, value.clone_state())
        if isinstance(value, random.Random) or hasattr(value, "bit_generator") or is_iterator(value):
            return self._remember(value, copy.copy(value) if is_iterator(value) else copy.deepcopy(value))
        return value

    def _through(self, value: Any) -> Any:
        """A copy of an object through which a module is reached."""
        if isinstance(value, types.MethodType):
            return types.MethodType(self.value(value.__func__), self.value(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {key: self.value(v) for key, v in value.keywords.items()}
            return functools.partial(
                self.value(value.func), *(self.value(a) for a in value.args), **keywords
            )
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if type(value) is CACHED:
            again = functools.lru_cache(**value.cache_parameters())
            return self._remember(value, again(self.value(value.__wrapped__)))
        if isinstance(value, weakref.ref):
            return type(value)(self.value(value()))
        if is_holder(value):
            return self._holder(value)
        return value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = tuple(self._cell(cell) for cell in function.__closure__ or ())
        code, name = function.__code__, function.__name__
        twin = types.FunctionType(code, function.__globals__, name, function.__defaults__, cells)
        self._remember(function, twin)
        twin.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(twin, function)
        twin.__dict__.update({key: self.value(held) for key, held in vars(function).items()})
        return twin

    def _cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) not in self._done:
            made = self._remember(cell, types.CellType())
            made.cell_contents = self.value(cell_value(cell))
        twin: types.CellType = self._done[id(cell)]
        return twin

    def _holder(self, value: Any) -> Any:
        cls = type(value)
        # only the ones of users' classes are surely made by object
        twin = self._remember(value, object.__new__(cls) if is_users(cls) else cls())
        getattr(twin, "__dict__", {}).update(
            {key: self.value(v) for key, v in getattr(value, "__dict__", {}).items()}
        )
        for name, held in slot_values(value):
            object.__setattr__(twin, name, self.value(held))
        return twin

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        # copy() keeps the class and what it carries (OrderedDict, defaultdict)
        twin = self._remember(value, value.copy())
        if type(twin) is not type(value):
            return value
        for key in list(twin):
            twin[key] = self.value(twin[key])
        return twin

    def _remember(self, original: Any, twin: Any) -> Any:
        self._seen.append(original)
        self._done[id(original)] = twin
        return twin


def _leading_to_modules(root: nn.Module) -> set[int]:
    """The ids of all objects through which a module in `root` is reached."""
    holders: dict[int, list[Any]] = {}
    seen: dict[int, Any] = {id(root): root}
    waiting: collections.deque[Any] = collections.deque([root])
    pending: list[Any] = []
    others = 0
    while waiting and others < MANY:
        value = waiting.popleft()
        if isinstance(value, nn.Module):
            pending.append(value)
        elif not isinstance(value, dict):
            others += 1
        for held in held_by(value):
            holders.setdefault(id(held), []).append(value)
            if id(held) not in seen:
                seen[id(held)] = held
                waiting.append(held)
    leading: set[int] = set()
    while pending:
        for holder in holders.get(id(pending.pop()), ()):
            if id(holder) not in leading:
                leading.add(id(holder))
                pending.append(holder)
    return leading
