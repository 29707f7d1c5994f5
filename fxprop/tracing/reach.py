"""What the code of a model reaches: its functions, the names they read, and what those names stand for.

Found by reading code objects, so it is as much as Python code says by name: global variables, closures,
default arguments, methods called by their name. torch's and Python's own code is left out.
"""

from __future__ import annotations

import dis
import functools
import types
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprop.tracing.objects import ATOMS, CACHED, MANY, cell_value, held_by, is_holder, is_users

# methods that are called without their name being written
_UNNAMED = frozenset(
    ("__call__", "__getattr__", "__getattribute__", "__setattr__", "__getitem__", "__setitem__", "__len__")
) | frozenset(
    ("__iter__", "__next__", "__enter__", "__exit__", "__contains__", "__bool__", "forward", "train")
)

_TORCH = str(Path(torch.__file__).parent)

# tables of functions with more entries are not followed
_MANY = 256


# parts of the names by which code asks whether gradients, autocast or inference mode are enabled; torch's
# own code that does is named by the user's
_SURROUNDINGS = ("grad", "autocast", "amp", "infer", "checkpoint", "_C", "dispatch")


def methods_beside_forward(root: nn.Module) -> list[str]:
    """Public methods of a user's model that call children of it, and that its forward does not."""
    methods = {
        name: function
        for cls in reversed(type(root).__mro__)
        if is_users(cls)
        for name, function in vars(cls).items()
        if isinstance(function, types.FunctionType) and name not in dir(nn.Module)
    }
    calling, before = set(root._modules), -1
    while len(calling) != before:  # also those that call such methods
        before = len(calling)
        calling |= {name for name, function in methods.items() if calling & _names(function.__code__)}
    public = [name for name in methods if name in calling and not name.startswith("_")]
    if public in ([], ["forward"]):
        return []
    from_forward = {id(function) for function in Reach(root).functions}
    return [name for name in public if id(methods[name]) not in from_forward]


class Reach:
    """Everything that the code of the modules in `root`, run by calling `root`, may name."""

    def __init__(self, root: nn.Module) -> None:
        # attributes and global variables that the code mentions
        self.names: set[str] = set()
        # (namespace, name) of global variables and attributes of Python modules that it reads
        self.variables: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
        # where else values live that outlast a call: closures' cells, default arguments, users' classes
        self.cells: dict[int, types.CellType] = {}
        self.defaults: dict[int, Any] = {}
        self.classes: dict[int, type] = {}
        # functions under functools.cache or lru_cache
        self.cached: dict[int, Any] = {}
        self.functions: list[types.FunctionType] = []
        self._seen: set[int] = set()
        self._methods: defaultdict[str, list[Any]] = defaultdict(list)
        self._namespaces: dict[int, dict[str, Any]] = {}
        self._waiting: list[Any] = []
        # whether there are modules, or functions around users', that torch.fx traces and that are not read
        self.others = False
        for module in root.modules():
            self._class(type(module))
            self.others |= _is_of_others(type(module))
            self._waiting += [v for v in vars(module).values() if _leads_to_code(v)]
        while self._waiting and len(self._seen) < MANY:
            self._visit(self._waiting.pop())

    def line_of(self, name: str) -> str:
        """The line that writes the attribute or variable `name`, or one that reads it: "file.py:12"."""
        reader = ""
        for function in self.functions:
            for code in (function.__code__, *_inner(function.__code__)):
                line = code.co_firstlineno
                for instruction in dis.get_instructions(code):
                    line = instruction.starts_line or line
                    if instruction.argval == name and isinstance(line, int):
                        if instruction.opname.startswith("STORE"):
                            return f"{code.co_filename}:{line}"
                        reader = reader or f"{code.co_filename}:{line}"
        return reader

    def reads_its_mode(self) -> bool:
        """Whether users' code may do something else in the other mode."""
        follow = any("train" in vars(cls) or "eval" in vars(cls) for cls in self.classes.values())
        return follow or "training" in self.names or any(map(_inherits_code, self.classes.values()))

    def may_ask_for_surroundings(self) -> bool:
        """Whether users' code may do something else without gradients, under autocast and the like."""
        named = any(part in name for name in self.names for part in _SURROUNDINGS)
        return named or any(map(_inherits_code, self.classes.values()))

    def tells_stand_ins(self) -> frozenset[types.CodeType]:
        """The code that may do something else with fake tensors than with real ones, though it runs.

        It asks for a value's very class, or catches errors, which fake tensors do not raise alike.
        """
        codes = [code for f in self.functions for code in (f.__code__, *_inner(f.__code__))]
        return frozenset(code for code in codes if _tells_stand_ins(code))

    def _visit(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if type(value) is CACHED:
            self.cached[id(value)] = value
            self._waiting.append(value.__wrapped__)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType | staticmethod | classmethod):
            self._waiting.append(value.__func__)
        elif isinstance(value, functools.partial):
            self._waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, functools.cached_property):
            self._waiting.append(value.func)
        elif isinstance(value, property):
            self._waiting += [value.fget, value.fset]
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            if is_users(value):
                self._namespace(vars(value))
        elif isinstance(value, dict | list | tuple) and len(value) <= _MANY:
            held = value.values() if isinstance(value, dict) else value
            self._waiting += [v for v in held if _leads_to_code(v)]
        elif is_holder(value):
            self._class(type(value))
            self._waiting += [v for v in held_by(value) if _leads_to_code(v)]

    def _function(self, function: types.FunctionType) -> None:
        self.others |= function.__code__.co_filename.startswith(_TORCH)
        if not is_users(function):
            # a decorator of a library's around a function of the user's
            self._waiting += [v for v in _closure(function) if _is_code(v)]
            return
        self.functions.append(function)
        for cell in function.__closure__ or ():
            self.cells[id(cell)] = cell
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        self.defaults.update({id(value): value for value in defaults})
        self._waiting += [*_closure(function), *defaults, *vars(function).values()]
        self._namespace(function.__globals__)
        for name in _names(function.__code__) - self.names:
            self.names.add(name)
            self._waiting += self._methods[name]
            for namespace in self._namespaces.values():
                if name in namespace:
                    self._variable(namespace, name)

    def _namespace(self, namespace: dict[str, Any]) -> None:
        if id(namespace) not in self._namespaces:
            self._namespaces[id(namespace)] = namespace
            for name in self.names & namespace.keys():
                self._variable(namespace, name)

    def _variable(self, namespace: dict[str, Any], name: str) -> None:
        self.variables[id(namespace), name] = namespace, name
        self._waiting.append(namespace[name])

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if id(base) in self.classes or not is_users(base):
                continue
            self.classes[id(base)] = base
            for name, value in list(vars(base).items()):
                if not _is_code(value):
                    continue
                if name in _UNNAMED or name in self.names:
                    self._waiting.append(value)
                else:
                    self._methods[name].append(value)


_CONTAINERS = (object, nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _inherits_code(cls: type) -> bool:
    """Whether a user's class has the code of a module of torch's, which is not read here."""
    bases = (base for base in cls.__mro__ if issubclass(base, nn.Module) and not is_users(base))
    return any(base not in _CONTAINERS for base in bases)


def _is_of_others(cls: type) -> bool:
    known = is_users(cls) or cls in _CONTAINERS or cls.__module__.startswith("torch.nn")
    return not known or issubclass(cls, nn.MultiheadAttention)


def _is_code(value: Any) -> bool:
    kinds = (types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.partial)
    return isinstance(value, (*kinds, functools.cached_property, CACHED))


def _leads_to_code(value: Any) -> bool:
    if type(value) in ATOMS:
        return False
    if isinstance(value, dict | list | tuple):
        return bool(value)
    return _is_code(value) or isinstance(value, type) or is_holder(value)


def _closure(function: types.FunctionType) -> list[Any]:
    return [cell_value(cell) for cell in function.__closure__ or ()]


def _names(code: types.CodeType) -> set[str]:
    """The global and attribute names in `code` and in the functions defined inside it."""
    names = set(code.co_names)
    for inner in _inner(code):
        names |= _names(inner)
    # getattr(x, "name") and x.__dict__["name"]
    return names | {value for value in code.co_consts if isinstance(value, str) and value.isidentifier()}


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


@functools.lru_cache(10_000)
def _tells_stand_ins(code: types.CodeType) -> bool:
    instructions = list(dis.get_instructions(code))
    for at, (one, following) in enumerate(pairwise(instructions)):
        catches = one.opname == "PUSH_EXC_INFO" and following.opname == "POP_TOP"  # a bare `except:`
        asks = one.argval == "__class__" or (one.argval == "type" and one.opname == "LOAD_GLOBAL")
        if asks and "__name__" not in [after.argval for after in instructions[at : at + 8]]:
            return True
        if catches or one.opname == "CHECK_EXC_MATCH":
            return True
    return False
