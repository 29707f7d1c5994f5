"""Running a model's code so that it leaves no trace: what it can change is noted before and put back after.

Tensors are not looked at here: a `Twin` has its own, and `Account` sees what is written to others.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

# not a public path, but the one torch's own documentation imports it from
from torch._subclasses.fake_tensor import FakeTensor

from fxprop.tracing.objects import ATOMS, MANY, cell_value, held_by, is_holder, is_iterator, slot_values
from fxprop.tracing.reach import Reach

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTENTS = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "child"}
AUTOCAST = ("cpu", "cuda", "xpu", "mps")


class _Kept(NamedTuple):
    """Something that code can change."""

    # what has changed of it, in words
    changes: Callable[[], list[str]]
    put_back: Callable[[], None]


class PythonState:
    """What Python holds that the code of `root` can change: attributes, containers, globals, closures.

    >>> state = PythonState(model)
    >>> y = model(x); state.changes()
    ["attribute 'calls' of the model"]
    >>> state.restore()
    """

    def __init__(self, root: nn.Module, *others: Any) -> None:
        self._kept: list[_Kept] = []
        # holds what was seen, so that no id is used twice
        self._seen: dict[int, Any] = {}
        self._waiting: collections.deque[tuple[str, Any]] = collections.deque()
        for name, module in root.named_modules():
            self._module(f"of module {name!r}" if name else "of the model", module)
        self._waiting += [("the inputs", other) for other in others]
        self.reach = Reach(root)
        self._misses = {key: function.cache_info().misses for key, function in self.reach.cached.items()}
        for namespace, name in self.reach.variables.values():
            self._variable(namespace, name)
        for cell in self.reach.cells.values():
            self._cell(cell)
        self._waiting += [("a default argument", value) for value in self.reach.defaults.values()]
        for function in self.reach.functions:
            self._mapping(f"attribute {{!r}} of the function {function.__name__}", vars(function))
        for cls in self.reach.classes.values():
            self._class(cls)
        looked_at = 0
        while self._waiting and looked_at < MANY:
            looked_at += self._value(*self._waiting.popleft())

    def changes(self) -> list[str]:
        """What is not as it was."""
        return list(dict.fromkeys(change for kept in self._kept for change in kept.changes()))

    # what was not as it was when the context in which it was kept was left
    changed: tuple[str, ...] = ()

    def restore(self) -> None:
        """Put everything back, and empty caches of functions that hold what only a run has."""
        for kept in self._kept:
            if kept.changes():
                kept.put_back()
        for function in self.reach.cached.values():
            if function.cache_info().misses != self._misses[id(function)] and _holds_stand_in(function):
                function.cache_clear()

    # --- what is kept ------------------------------------------------------------------------------------

    def _module(self, place: str, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        attributes = vars(module)
        self._mapping(f"attribute {{!r}} {place}", attributes)
        for key, kind in _CONTENTS.items():
            contents = attributes[key]
            self._seen[id(contents)] = contents
            self._mapping(f"{kind} {{!r}} {place}", contents)
        for key, value in attributes.items():
            no_hooks = type(value) is collections.OrderedDict and not value and key.endswith("hooks")
            if type(value) not in ATOMS and not no_hooks:
                self._waiting.append((f"attribute {key!r} {place}", value))
        self._slots(place, module)

    def _value(self, where: str, value: Any) -> bool:
        """Keep `value`; whether there was something to look at."""
        if type(value) in ATOMS or id(value) in self._seen or isinstance(value, torch.Tensor | type):
            return False
        if isinstance(value, nn.Module):
            self._module(f"of a module in {where}", value)
            return True
        self._seen[id(value)] = value
        if isinstance(value, dict):
            self._mapping(where, value)
        elif isinstance(value, list | set | collections.deque):
            self._container(where, value)
        elif isinstance(value, torch.Generator):
            self._state(where, value.get_state, value.set_state)
        elif isinstance(value, random.Random):
            self._state(where, value.getstate, value.setstate)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                self._cell(cell)
        elif hasattr(value, "bit_generator"):  # of NumPy's
            generator, drawn = value.bit_generator, value.bit_generator.state
            self._state(where, lambda: repr(generator.state), lambda _: setattr(generator, "state", drawn))
        elif is_iterator(value):
            self._state(where, lambda: repr(value.__reduce__()), lambda _: None)  # a copy's own
        elif type(value).__module__ == "numpy" and hasattr(value, "flags"):
            before = value.copy()
            self._keep(
                where,
                lambda: bool(value.shape == before.shape and value.tobytes() == before.tobytes()),
                lambda: value.__setitem__(..., before),
            )
        elif is_holder(value):
            if hasattr(value, "__dict__"):
                self._mapping(where, vars(value))
            self._slots(where, value)
        self._waiting += [(where, held) for held in held_by(value)]
        return True

    def _keep(self, where: str, same: Callable[[], bool], put_back: Callable[[], Any]) -> None:
        self._kept.append(_Kept(lambda: [] if same() else [where], put_back))

    def _state(self, where: str, get: Callable[[], Any], set_: Callable[[Any], Any]) -> None:
        before = get()
        self._keep(where, lambda: _equal(get(), before), lambda: set_(before))

    def _mapping(self, where: str, value: dict[Any, Any]) -> None:
        # by dict's own methods, as subclasses may do more
        before = dict(dict.items(value))

        def changes() -> list[str]:
            same_keys = len(value) == len(before) and all(map(operator.is_, dict.keys(value), before))
            if same_keys and all(map(operator.is_, dict.values(value), before.values())):
                return []
            now = dict(dict.items(value))
            keys = now.keys() if now.keys() == before.keys() else now.keys() | before.keys()
            return [
                where.format(key)
                for key in keys
                if not _equal(now.get(key, _MISSING), before.get(key, _MISSING))
            ]

        def put_back() -> None:
            # of the same order as before, too
            dict.clear(value)
            dict.update(value, before)

        self._kept.append(_Kept(changes, put_back))

    def _container(self, where: str, value: Any) -> None:
        before = list(value)

        def put_back() -> None:
            value.clear()
            value.update(before) if isinstance(value, set) else value.extend(before)

        def same() -> bool:
            now = list(value)
            return len(now) == len(before) and all(map(_equal, now, before))

        self._keep(where, same, put_back)

    def _slots(self, where: str, value: Any) -> None:
        for name, held in slot_values(value):
            self._attribute(f"attribute {name!r} {where}", value, name, held)

    def _attribute(self, where: str, owner: Any, name: str, held: Any) -> None:
        self._keep(
            where,
            lambda: _equal(getattr(owner, name, _MISSING), held),
            lambda: setattr(owner, name, held),
        )
        self._waiting.append((where, held))

    def _variable(self, namespace: dict[str, Any], name: str) -> None:
        where = f"the global {name!r}"
        self._state(
            where, lambda: namespace.get(name, _MISSING), functools.partial(namespace.__setitem__, name)
        )
        self._waiting.append((where, namespace[name]))

    def _cell(self, cell: types.CellType) -> None:
        if id(cell) in self._seen:
            return
        self._seen[id(cell)] = cell
        where = "a variable of an enclosing function"
        self._state(where, lambda: cell_value(cell), functools.partial(setattr, cell, "cell_contents"))
        self._waiting.append((where, cell_value(cell)))

    def _class(self, cls: type) -> None:
        place = f"of the class {cls.__name__}"
        there = frozenset(vars(cls))

        def take_away() -> None:
            for name in set(vars(cls)) - there:
                delattr(cls, name)

        self._keep(f"an attribute {place}", lambda: there.issuperset(vars(cls)), take_away)
        names = {name for name in self.reach.names if not name.startswith("__")}
        for name in names & vars(cls).keys():
            value = vars(cls)[name]
            if not hasattr(value, "__get__"):  # nothing that is code
                self._attribute(f"attribute {name!r} {place}", cls, name, value)


_MISSING = object()


def _equal(now: Any, before: Any) -> bool:
    """Whether nothing has changed: the same object, or an equal number, text or the like."""
    if now is before:
        return True
    if isinstance(before, torch.Tensor):  # the state of a generator of torch's
        return before.dtype == torch.uint8 and isinstance(now, torch.Tensor) and torch.equal(now, before)
    if type(now) is not type(before):
        return False
    if isinstance(before, tuple):
        return len(now) == len(before) and all(map(_equal, now, before))
    if isinstance(before, types.MethodType):
        return bool(now == before)
    plain = isinstance(before, (*_PLAIN, torch.dtype, torch.device))
    return plain and bool(now == before)


# --- caches of functions ----------------------------------------------------------------------------------


def _holds_stand_in(function: Any) -> bool:
    """Whether the cache of a function holds a fake tensor or a proxy, in a key or in a result."""
    seen: set[int] = set()
    waiting = [(held, 0) for held in gc.get_referents(function) if not callable(held)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, FakeTensor | fx.Proxy | fx.Node):
            return True
        if id(value) in seen or depth > 6 or isinstance(value, torch.Tensor | type | types.ModuleType):
            continue
        seen.add(id(value))
        waiting += [(held, depth + 1) for held in gc.get_referents(value)]
    return False


# --- what is global ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def draws() -> Iterator[list[str]]:
    """A list that names, once the context is left, whose random numbers were drawn besides torch's."""
    drawn: list[str] = []
    before = _others_numbers()
    try:
        yield drawn
    finally:
        drawn += [name for name, state in _others_numbers().items() if state != before.get(name)]


def _others_numbers() -> Mapping[str, Any]:
    states: dict[str, Any] = {"random": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy.random"] = (kind, keys.tobytes(), *rest)
    return states


@contextlib.contextmanager
def untouched(root: nn.Module, *others: Any) -> Iterator[PythonState]:
    """A context after which all that the code of `root` can change in Python is as it was before it."""
    state = PythonState(root, *others)
    with global_state_kept():
        try:
            yield state
        finally:
            state.changed = tuple(state.changes())
            state.restore()


@contextlib.contextmanager
def collecting(enabled: bool) -> Iterator[None]:
    """Python's collector of cycles on or off: it looks through all objects of a model again and again.

    On inside of off, it looks through those alone that were made meanwhile.
    """
    before, aside = gc.isenabled(), not (enabled or gc.get_freeze_count())
    gc.enable() if enabled else gc.disable()
    if aside:
        gc.freeze()
    try:
        yield
    finally:
        if aside:
            gc.unfreeze()
        gc.enable() if before else gc.disable()


@contextlib.contextmanager
def tensors_kept(root: nn.Module) -> Iterator[None]:
    """The parameters and buffers of `root` have afterwards the memory and the flags that they have now."""
    tensors = [*root.parameters(), *root.buffers()]
    # what is written to the memory itself is undone elsewhere
    before = [(tensor, tensor.detach(), tensor.requires_grad) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, alias, requires_grad in before:
            readable = not (alias.is_meta or isinstance(alias, FakeTensor))
            if readable and tensor.data_ptr() != alias.data_ptr():
                tensor.data = alias
            if tensor.is_leaf and tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)


@contextlib.contextmanager
def global_state_kept() -> Iterator[None]:
    """Random numbers, grad mode, autocast and the defaults for new tensors are as before afterwards."""
    python = random.getstate()
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    grad, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    kinds = {kind: torch.is_autocast_enabled(kind) for kind in AUTOCAST}
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in AUTOCAST}
    cached = torch.is_autocast_cache_enabled()
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                sys.modules["numpy"].random.set_state(numpy)
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)
            for kind, enabled in kinds.items():
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtypes[kind])
            torch.set_autocast_cache_enabled(cached)
            torch.clear_autocast_cache()
            torch.autograd.set_detect_anomaly(*anomaly)
