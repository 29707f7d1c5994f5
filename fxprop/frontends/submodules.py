"""Any model to graphs: the whole of it if torch.fx can trace it, else the largest parts that it can.

One run of the model shows how its modules are called. Where the model cannot be traced, its children are
tried, and so on down to single layers. A part becomes a graph only if nothing about its calls has to be
fixed for that, so that code around it may go on calling it as it likes. Code that is left over runs as it
is written; the products with parameters in it are replaced as they are called (see `calls.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxprop.errors import InputError, TraceError, ValuesNeededError
from fxprop.frontends.attention import TraceableAttention, is_attention
from fxprop.frontends.export import trace_exported
from fxprop.frontends.fakes import Twin, has_values
from fxprop.frontends.hooks import preserved
from fxprop.frontends.leaves import IS_MODULE, holds_matrices, is_dense, is_readable, is_users
from fxprop.frontends.module import Graphs, TracedModule
from fxprop.frontends.symbolic import LeafModules, TracedGraphs, bind_arguments, trace_modes
from fxprop.frontends.traced import Traced
from fxprop.frontends.tree import copy_tree
from fxprop.frontends.watch import Watch
from fxprop.ops.table import (
    Product,
    arguments,
    dense_function,
    read_module,
    registered_classes,
)


@dataclass(frozen=True)
class CallPattern:
    """How a module was called once."""

    # every argument that was given is a tensor, and every one that the module takes was given
    plain: bool
    # it was given one tensor and nothing else
    one_tensor: bool
    # "query is key" and the like, for attention
    same: frozenset[str]


@dataclass
class Observation:
    """What one run of the untouched model showed."""

    calls: dict[str, list[CallPattern]] = field(default_factory=dict)
    # (module at work, parameter) of every product with a parameter
    products: dict[tuple[str, str], None] = field(default_factory=dict)


def trace_model(
    model: nn.Module,
    frontend: str,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None,
    leaf_modules: LeafModules = (),
    preserve_modules: LeafModules = (),
) -> Traced:
    """Graphs of all that can be traced of `model`.

    >>> traced = trace_model(transformers.BertModel(config), "auto", ((), {"input_ids": ids}))
    >>> traced.frontend, "encoder.layer.0.intermediate" in traced.pieces
    ('submodules', True)

    `frontend` is "auto", "symbolic", "submodules" or "export"; `inputs` are (args, kwargs);
    `preserve_modules` are those that stay modules, with a graph of their own. Raises TraceError where
    a whole graph was asked for, or there are no inputs to see a run with, and torch.fx cannot trace it.
    """
    if frontend == "export":
        if preserve_modules:
            raise TraceError(
                "the export front-end makes one graph of the whole model and cannot preserve modules; use "
                'frontend="symbolic" or "submodules"'
            )
        return trace_exported(model, inputs)
    given = bind_arguments(model, *inputs) if inputs is not None else {}
    descent = _Descent(model, inputs, leaf_modules, preserved(model, preserve_modules))
    if frontend != "submodules":
        try:
            descent.trace("", model, given)
            return descent.assemble("symbolic")
        except TraceError as error:
            if frontend == "symbolic":
                raise
            if inputs is None:
                raise TraceError(
                    f"{error} With example_inputs fxprop can also trace the parts of a model that cannot "
                    "be traced whole."
                ) from error
            descent.untraced[""] = str(error)
    elif inputs is None:
        raise TraceError("the submodules front-end needs example_inputs: it has to see the model run")
    descent.visit("", model, whole=False)
    return descent.assemble("submodules")


class _Descent:
    """The graphs found so far, on the way down a model."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None,
        leaf_modules: LeafModules,
        preserve: frozenset[str],
    ) -> None:
        self._preserve = preserve
        self._model, self._inputs, self._leaf_modules = model, inputs, leaf_modules
        self._graphs: dict[str, TracedGraphs] = {}
        self.untraced: dict[str, str] = {}
        self._opaque: dict[str, str] = {}
        self._observed: Observation | None = None
        self._visited: set[int] = set()

    def trace(self, path: str, module: nn.Module, given: Mapping[str, Any] | None) -> None:
        """Take `module` as one graph; its leaves that hold more are visited on their own."""
        leaves: set[str] = set()
        preserve = self._preserve - {path}
        while True:
            names = [name.removeprefix(f"{path}.") for name in (*self._named_leaves(), *preserve)]
            traced = trace_modes(module, given, [*self._leaf_types(), *names, *leaves])
            found = _wrappers(module, traced.graphs) - leaves if self._inputs is not None else set()
            if "" in found:
                raise TraceError(f"{type(module).__name__} calls a function that is kept as one call")
            if not found:
                break
            leaves |= found
        if path and traced.untraced:
            raise TraceError(traced.untraced)  # a part has to follow the model into either mode
        self._graphs[path] = traced
        for target in _called(traced.graphs):
            name, leaf = ".".join(filter(None, (path, target))), module.get_submodule(target)
            if name in preserve or not is_readable(leaf) or self._is_users_leaf(name, leaf):
                self.visit(name, leaf, whole=target not in leaves)

    def visit(self, path: str, module: nn.Module, *, whole: bool = True) -> None:
        """Find graphs in `module`, as a whole if `whole` and possible."""
        if id(module) in self._visited or not holds_matrices(module):
            return
        self._visited.add(id(module))
        if self._is_users_leaf(path, module):
            self._opaque[path] = "kept as one call, as leaf_modules says; its FLOPs are in `other`"
            return
        if is_dense(module):
            self._opaque[path] = ""
            return
        called = self._inputs is None or path in self.observed.calls
        if whole and called:
            try:
                self._trace_part(path, module)
                return
            except TraceError as error:
                self.untraced[path] = str(error)
        elif called:
            self.untraced.setdefault(path, "it calls a function that is kept as one call")
        before = len(self._graphs) + len(self._opaque)
        for name, child in module.named_children():
            self.visit(".".join(filter(None, (path, name))), child)
        reached = len(self._graphs) + len(self._opaque) > before
        if self._inputs is None and not reached and path in self.untraced:
            self._opaque[path] = f"it cannot be traced: {self.untraced[path]}"

    def _trace_part(self, path: str, module: nn.Module) -> None:
        calls = self.observed.calls[path] if self._inputs is not None else [_unseen(module)]
        given: Mapping[str, Any] | None = None
        part = module
        if is_attention(module):
            part = copy_tree(module)
            part.__class__ = TraceableAttention
            assert isinstance(part, TraceableAttention)
            part.same = frozenset.intersection(*(call.same for call in calls))
        elif isinstance(module, registered_classes()):
            self._graphs[path] = TracedGraphs(_as_product(module, calls), "", {})
            return
        elif not all(call.plain for call in calls):
            if not is_readable(module) or not all(call.one_tensor for call in calls):
                raise TraceError("it is called with arguments that a graph would have to fix")
            given = {}
        self.trace(path, part, given)

    @property
    def observed(self) -> Observation:
        """One run of the model; made when it is first needed."""
        if self._observed is None:
            assert self._inputs is not None
            self._observed = observe(self._model, *self._inputs)
        return self._observed

    def _leaf_types(self) -> list[type[nn.Module]]:
        return [leaf for leaf in self._leaf_modules if not isinstance(leaf, str)]

    def _named_leaves(self) -> list[str]:
        return [leaf for leaf in self._leaf_modules if isinstance(leaf, str)]

    def _is_users_leaf(self, path: str, module: nn.Module) -> bool:
        return path in self._named_leaves() or isinstance(module, tuple(self._leaf_types()))

    def assemble(self, frontend: str) -> Traced:
        """A copy of the model's tree with the traced modules in their places."""
        root = copy_tree(self._model)
        pieces: dict[str, TracedModule] = {}
        for path, traced in self._graphs.items():
            part = root.get_submodule(path)
            part.__dict__.update(traced.constants)
            if path or not isinstance(part, fx.GraphModule):
                pieces[path] = TracedModule.fx_install(part, traced.graphs, untraced=traced.untraced)
            else:
                name = type(self._model).__name__
                root = pieces[""] = TracedModule(part, traced.graphs, name, untraced=traced.untraced)
        products: dict[str, tuple[str, ...]] = {}
        if self._inputs is not None and self.untraced:
            for module, parameter in self.observed.products:
                if module in self.untraced:
                    products[module] = (*products.get(module, ()), parameter)
        return Traced(
            root,
            frontend,
            pieces,
            untraced={path: why for path, why in self.untraced.items() if path not in self._graphs},
            products=products,
            opaque=self._opaque,
        )


def _as_product(module: nn.Module, calls: list[CallPattern]) -> Graphs:
    """The graph of a module of a registered class: the dense operator that its reader names."""
    kind = type(module).__name__
    names = list(inspect.signature(module.forward).parameters)
    if not all(call.plain or call.one_tensor for call in calls):
        raise TraceError(f"{kind} is called with arguments that a graph would have to fix")
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in (names if calls[0].plain else names[:1])]
    product = read_module(module, tuple(inputs), {})
    if product is None:
        raise TraceError(f"the reader registered for {kind} reads no product in its call")

    def fetched(value: Any) -> Any:
        return graph.get_attr(value) if isinstance(value, str) else value

    operands = replace(
        product, input=fetched(product.input), weight=fetched(product.weight), bias=fetched(product.bias)
    )
    args, constants = arguments(operands)
    constants.pop("weight", None)
    node = graph.call_function(dense_function(product.op), args, constants)
    node.meta[IS_MODULE] = True
    graph.output(node)
    return dict.fromkeys((True, False), graph)


def _wrappers(module: nn.Module, graphs: Graphs) -> set[str]:
    """The modules whose code hands matrices to a function that is kept as one call."""
    found: set[str] = set()
    for graph in graphs.values():
        for node in graph.nodes:
            if node.op == "call_function" and is_users(node.target) and _takes_matrix(module, node):
                stack = node.meta.get("nn_module_stack") or {"": None}
                found.add(list(stack)[-1])
    return found


def _takes_matrix(module: nn.Module, node: fx.Node) -> bool:
    for input_ in node.all_input_nodes:
        if input_.op == "get_attr":
            path, _, name = str(input_.target).rpartition(".")
            parameter = vars(module.get_submodule(path))["_parameters"].get(name)
            if parameter is not None and parameter.dim() >= 2:
                return True
    return False


def _called(graphs: Graphs) -> list[str]:
    """The modules that the graphs call."""
    nodes = (node for graph in graphs.values() for node in graph.nodes)
    return list(dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module"))


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """Run the untouched model once, on fake tensors or, where it reads values, on real ones."""
    try:
        return _observe(model, args, kwargs, real=False)
    except Exception as error:
        if not has_values(model, args, kwargs):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValuesNeededError(
                f"the model cannot run on fake tensors, which have shapes but no values: {reason}. Give "
                "example inputs that are real, and a model with real weights."
            ) from error
    try:
        return _observe(model, args, kwargs, real=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the model cannot run on the example inputs: {reason}. Pass inputs of the shape, dtype and "
            "device that the model takes."
        ) from error


@torch.inference_mode(False)
def _observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, real: bool
) -> Observation:
    found = Observation()
    twin = Twin(model, args, kwargs, real=real)

    def on_call(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.calls.setdefault(name, []).append(_pattern(module, args, kwargs))

    def on_product(module: str, parameter: str, product: Product, result: Any, source: str | None) -> None:
        found.products.setdefault((module, parameter))

    with twin.running(), Watch(twin, on_call, on_product).watching():
        twin.root(*twin.args, **twin.kwargs)
    return found


def _pattern(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallPattern:
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return CallPattern(plain=False, one_tensor=False, same=frozenset())
    named = all(
        p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for p in signature.parameters.values()
    )
    given = bound.arguments
    tensors = all(isinstance(value, torch.Tensor) for value in given.values())
    pairs = (("query", "key"), ("key", "value"))
    same = {f"{a} is {b}" for a, b in pairs if given.get(a) is not None and given.get(a) is given.get(b)}
    plain = named and tensors and len(given) == len(signature.parameters)
    return CallPattern(plain, tensors and len(given) == 1, frozenset(same))


def _unseen(module: nn.Module) -> CallPattern:
    """The pattern of a module that was not seen: plain if it takes nothing but required arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = inspect.Parameter.POSITIONAL_OR_KEYWORD
    plain = all(p.kind == required and p.default is inspect.Parameter.empty for p in parameters)
    return CallPattern(plain, False, frozenset())
