"""A copy of a module tree that shares its tensors.

fxprop works on such a copy, so that whatever tracing, switching of modes or user code does to a module
lands there and never on the model that was passed in.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxprop.frontends.generated import is_generated, sibling


def copy_tree(root: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> nn.Module:
    """A new module of the same classes, with `tensor(t)` in place of each tensor t (default: t itself).

    >>> twin = copy_tree(model)
    >>> twin.fc is model.fc, twin.fc.weight is model.fc.weight
    (False, True)

    References between modules (in lists, dicts, bound methods, partials) point into the copy. Whatever
    else a module holds is shared. A tensor or module met twice is mapped once.
    """
    return _Copier(tensor).module(root)


class _Copier:
    def __init__(self, tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._tensor = tensor
        self._done: dict[int, Any] = {}
        # keeps the originals alive, so that an id in `_done` cannot be reused
        self._seen: list[Any] = []

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._done:
            generated = is_generated(type(module))
            twin: Any = object.__new__(sibling(type(module)) if generated else type(module))
            self._remember(module, twin)
            twin.__dict__.update({key: self.value(v) for key, v in vars(module).items()})
            if generated:  # the class of the original is for that one alone
                getattr(twin, "fx_after_copy", twin.recompile)()
        twin = self._done[id(module)]
        assert isinstance(twin, nn.Module)
        return twin

    def value(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.module(value)
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, torch.Tensor):
            return self._remember(value, self._tensor(value))
        if isinstance(value, dict):
            return self._dict(value)
        if type(value) in (list, set):
            twin = self._remember(value, type(value)())
            copies = [self.value(item) for item in value]
            twin.extend(copies) if isinstance(twin, list) else twin.update(copies)
            return twin
        if isinstance(value, tuple):
            items = tuple(self.value(item) for item in value)
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if type(value) is functools.partial:
            keywords = {key: self.value(v) for key, v in value.keywords.items()}
            return functools.partial(
                self.value(value.func), *(self.value(a) for a in value.args), **keywords
            )
        return value

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
