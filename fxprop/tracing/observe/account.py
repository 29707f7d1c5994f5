"""What a run of a model does, operator by operator: the account by which a graph is held to its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprop.tracing.observe.tensors import Made, is_random, storage_of, tensors_in, written_by
from fxprop.tracing.observe.untouched import AUTOCAST
from fxprop.tracing.observe.watch import Watch
from fxprop.tracing.source_lines import users_line


class Op(NamedTuple):
    """One operator that depends on inputs, parameters, buffers or random numbers, or that writes."""

    name: str
    # its arguments, with labels in place of tensors: a name, or the number of the operator that made it
    operands: tuple[Any, ...]
    results: tuple[Any, ...]
    # what it changes that was there before the run
    writes: tuple[str | int | None, ...]
    # grad mode, and autocast where it is on
    modes: tuple[bool, ...]
    # the calls of modules at work, from the outermost: (name, how many-th call of it)
    at: tuple[tuple[str, int], ...]
    # the user's line
    line: str


class Account(Made):  # type: ignore[no-untyped-call]
    """Notes the operators of a run of a twin, without those that compute constants.

    Views are left out: what they do shows in the shapes of what uses them.
    """

    def __init__(self, watch: Watch, state: Mapping[int, str]) -> None:
        super().__init__()
        self._watch = watch
        # by storage: the name of a parameter, buffer or input, or the number of the operator that made it
        self._labels: dict[int, str | int] = dict(state)
        # so that no storage is used twice
        self._held: list[Any] = []
        self.ops: list[Op] = []
        # whether it asked for values that fake tensors do not have
        self.wanted_values = False

    def called(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], written: list[Tensor]
    ) -> Any:
        if self._watch.aside:
            return function(*args, **kwargs)
        labels = [self._labels.get(storage_of(t)) for t in tensors_in((*args, *kwargs.values()))]
        depends = is_random(function) or bool(written) or any(label is not None for label in labels)
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            self.wanted_values |= type(error).__module__.startswith("torch._subclasses")
            raise
        self._held.append(result)
        if depends and not function.is_view:
            self._note(function, args, kwargs, result, written)
        elif depends:
            for tensor in tensors_in(result):
                self._labels.setdefault(storage_of(tensor), next(x for x in labels if x is not None))
        return result

    def _note(
        self, function: Any, args: Any, kwargs: Mapping[str, Any], result: Any, written: list[Tensor]
    ) -> None:
        name = str(function.overloadpacket)
        if function._schema.is_mutable and not written:
            name = name.removesuffix("_")
        writes = tuple(self._labels.get(storage_of(tensor)) for tensor in written)
        operands = (*map(self._describe, args), *((k, self._describe(v)) for k, v in kwargs.items()))
        for tensor in tensors_in(result):
            self._labels.setdefault(storage_of(tensor), len(self.ops))
        for tensor in written_by(function, args, kwargs):
            # a tensor of the run's own is a new one then: torch.fx makes `h = h + x` of `h += x`
            if not written:
                self._labels[storage_of(tensor)] = len(self.ops)
        modes = (torch.is_grad_enabled(), *(torch.is_autocast_enabled(kind) for kind in AUTOCAST))
        results = tuple((tuple(t.shape), t.dtype) for t in tensors_in(result))
        at = tuple(self._watch.stack)
        self.ops.append(Op(name, operands, results, writes, modes, at, users_line()))

    def _describe(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._labels.get(storage_of(value)), tuple(value.shape), value.dtype
        if isinstance(value, list | tuple):
            return tuple(map(self._describe, value))
        return value if isinstance(value, int | float | str | bool | None) else str(value)
