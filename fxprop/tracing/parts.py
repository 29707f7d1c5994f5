"""Any model to graphs: the whole of it if torch.fx can trace it, else the largest parts that it can.

One run of the model shows how its modules are called. Where the model cannot be traced, its children are
tried, and so on down to single layers. A part becomes a graph only if nothing about its calls has to be
fixed for that, so that code around it may go on calling it as it likes. Code that is left over runs as it
is written; products with parameters in it are replaced when they are called (`graph/sparse_products.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprop.errors import InputError, TraceError
from fxprop.ops.catalogue import OPERATORS, arguments, read_module
from fxprop.ops.registered import registered_classes
from fxprop.tracing.attention import TraceableAttention, is_attention
from fxprop.tracing.export import trace_exported
from fxprop.tracing.hooks import called_modules, names_to_preserve
from fxprop.tracing.module.copy_tree import copy_tree
from fxprop.tracing.module.stored import Graphs
from fxprop.tracing.module.traced_module import TracedModule, name_in_the_way
from fxprop.tracing.module_kinds import (
    DENSE_MODULES,
    IS_MODULE,
    holds_matrices,
    is_readable,
    is_users,
    own_parameters,
)
from fxprop.tracing.observe.accounting import CallPattern, Observation, observe
from fxprop.tracing.observe.agreement import disagreements
from fxprop.tracing.observe.products import with_operands
from fxprop.tracing.observe.records import Run
from fxprop.tracing.observe.run import Recording
from fxprop.tracing.reach import Reach
from fxprop.tracing.symbolic import TracedGraphs, bind_arguments, trace_modes
from fxprop.tracing.traced import Inputs, Traced
from fxprop.tracing.tracer import LeafModules, the_model


def trace_model(
    model: nn.Module,
    frontend: str,
    inputs: Inputs | None,
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
    descent = _Descent(model, inputs, leaf_modules, names_to_preserve(model, preserve_modules))
    descent.asked_for = frontend == "symbolic"
    if frontend != "submodules":
        try:
            return descent.trace_until_agreed("symbolic", lambda: descent.trace("", model, given))
        except TraceError as error:
            if frontend == "symbolic":
                raise
            if inputs is None:
                raise TraceError(
                    f"{error} With example_inputs fxprop can also trace the parts of a model that cannot "
                    "be traced whole."
                ) from error
            descent.refused[""] = str(error)
    elif inputs is None:
        raise TraceError("the submodules front-end needs example_inputs: it has to see the model run")
    return descent.trace_until_agreed("submodules", lambda: descent.visit("", model, whole=False))


class _Descent:
    """The graphs found so far, on the way down a model."""

    def __init__(
        self, model: nn.Module, inputs: Inputs | None, leaf_modules: LeafModules, preserve: frozenset[str]
    ) -> None:
        self._preserve = preserve
        self._model, self._inputs = model, inputs
        self._leaf_types = tuple(leaf for leaf in leaf_modules if not isinstance(leaf, str))
        self._leaf_names = [leaf for leaf in leaf_modules if isinstance(leaf, str)]
        self._observed: dict[bool, Observation] = {}
        # whether one graph was asked for, be it of one mode alone
        self.asked_for = False
        # parts never to take as one graph, which would not do what they do, and why
        self.refused: dict[str, str] = {}
        self._begin()

    def _begin(self) -> None:
        self._graphs: dict[str, TracedGraphs] = {}
        self.untraced: dict[str, str] = {path: why for path, why in self.refused.items() if path == ""}
        self._opaque: dict[str, str] = {}
        self._visited: set[int] = set()

    def trace_until_agreed(self, frontend: str, go_down: Callable[[], None]) -> Traced:
        """The model with all graphs that `go_down` finds and that do what the model does.

        Parts whose graph does not are taken apart, and it begins again.
        """
        while True:
            self._begin()
            go_down()
            traced = self.assemble(frontend)
            faults = self._disagreements(traced)
            if not faults:
                return traced
            if frontend == "symbolic" and "" in faults:
                raise TraceError(f"torch.fx cannot trace {the_model(self._model)}: {faults['']}.")
            if faults.keys() <= self.refused.keys():
                path, why = next(iter(faults.items()))
                raise TraceError(f"{path!r} cannot be taken apart, and must be: {why}")
            self.refused |= faults

    @torch.inference_mode(False)
    def _disagreements(self, traced: Traced) -> dict[str, str]:
        faults: dict[str, str] = {}
        here, reach = self._model.training, Reach(self._model)
        if not (reach.functions or reach.others):
            return faults  # nothing but torch's own modules, each of which is called as it is
        for training in (here, not here) if reach.reads_its_mode() else (here,):
            pieces = {path for path, piece in traced.pieces.items() if training in piece.fx_graphs}
            if self._inputs is None or not pieces:
                continue
            try:
                model = self.observed(training)
            except InputError:
                if training == here:
                    raise
                continue  # it cannot run in that mode: batch norm on a batch of one
            counted = training == here or traced.other_mode_differs
            run, found = self._held_to(model, traced, pieces, training, backward=counted)
            faults |= found
            if counted:
                traced.runs[training] = run
        return faults

    def _held_to(
        self, model: Observation, traced: Traced, pieces: set[str], training: bool, *, backward: bool
    ) -> tuple[Run | InputError, dict[str, str]]:
        """A run of the graphs, and where they do something else than the model did."""
        assert self._inputs is not None
        # what reads values need not run for real twice, unless something seems to be wrong
        ways = ((None, False),) if model.answers is None else ((model.answers, False), (None, True))
        for answers, real in ways:
            recording = Recording(
                traced, training, *self._inputs, real=real, answers=answers, compared=True
            )
            run: Run | InputError
            try:
                run = recording.run(backward=backward)
            except InputError as error:
                run = error
            faults = disagreements(model, recording.observation, pieces, train=training)
            if isinstance(run, Run) and not faults:
                break
        return run, faults

    def trace(self, path: str, module: nn.Module, given: Mapping[str, Any] | None) -> None:
        """Take `module` as one graph; its leaves that hold more are visited on their own."""
        if path in self.refused:
            raise TraceError(self.refused[path])
        taken = name_in_the_way(module)
        if taken is not None:
            raise TraceError(
                f"{type(module).__name__} has an attribute, method or child {taken!r}, which a GraphModule "
                "uses itself"
            )
        leaves: set[str] = set()
        preserve = self._preserve - {path}
        while True:
            names = [name.removeprefix(f"{path}.") for name in (*self._leaf_names, *preserve)]
            traced = trace_modes(module, given, [*self._leaf_types, *names, *leaves])
            wrappers = _wrappers(module, traced.graphs) - leaves if self._inputs is not None else set()
            if "" in wrappers:
                raise TraceError(f"{type(module).__name__} calls a function that is kept as one call")
            if not wrappers:
                break
            leaves |= wrappers
        if traced.untraced and (path or (self._inputs is not None and not self.asked_for)):
            raise TraceError(traced.untraced)  # a part has to follow the model into either mode
        self._graphs[path] = traced
        targets = (target for graph in traced.graphs.values() for target in called_modules(graph))
        for target in dict.fromkeys(targets):
            name, leaf = ".".join(filter(None, (path, target))), module.get_submodule(target)
            if name in preserve or not is_readable(leaf) or self._is_users_leaf(name, leaf):
                self.visit(name, leaf, whole=target not in leaves)

    def visit(self, path: str, module: nn.Module, *, whole: bool = True) -> None:
        """Find graphs in `module`, as a whole if `whole` and possible."""
        if id(module) in self._visited or not holds_matrices(module):
            return
        self._visited.add(id(module))
        if self._is_users_leaf(path, module):
            self._opaque[path] = "kept as one call because of leaf_modules; its FLOPs are in `other`"
            return
        if isinstance(module, tuple(DENSE_MODULES)):
            self._opaque[path] = ""
            return
        called = self._inputs is None or path in self._here.calls
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
        calls = self._here.calls[path] if self._inputs is not None else [_guess_pattern(module)]
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

    def observed(self, training: bool) -> Observation:
        """One run of the model in a mode; made when it is first needed."""
        if training not in self._observed:
            assert self._inputs is not None
            self._observed[training] = observe(self._model, *self._inputs, training)
        return self._observed[training]

    @property
    def _here(self) -> Observation:
        return self.observed(self._model.training)

    def _is_users_leaf(self, path: str, module: nn.Module) -> bool:
        return path in self._leaf_names or isinstance(module, self._leaf_types)

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
            for module, parameter in self._here.products:
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

    def fetch(value: Any) -> Any:
        return graph.get_attr(value) if isinstance(value, str) else value

    args, constants = arguments(with_operands(product, fetch))
    constants.pop("weight", None)
    node = graph.call_function(OPERATORS[product.op].dense, args, constants)
    node.meta[IS_MODULE] = True
    graph.output(node)
    return dict.fromkeys((True, False), graph)


def _wrappers(module: nn.Module, graphs: Graphs) -> set[str]:
    """The modules whose code hands matrices to a function that is kept as one call."""
    wrappers: set[str] = set()
    for graph in graphs.values():
        for node in graph.nodes:
            if node.op == "call_function" and is_users(node.target) and _takes_matrix(module, node):
                stack = node.meta.get("nn_module_stack") or {"": None}
                wrappers.add(list(stack)[-1])
    return wrappers


def _takes_matrix(module: nn.Module, node: fx.Node) -> bool:
    for input_ in node.all_input_nodes:
        if input_.op == "get_attr":
            path, _, name = str(input_.target).rpartition(".")
            parameter = own_parameters(module.get_submodule(path)).get(name)
            if parameter is not None and parameter.dim() >= 2:
                return True
    return False


def _guess_pattern(module: nn.Module) -> CallPattern:
    """The pattern of a module that was not seen: plain if it takes nothing but required arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = inspect.Parameter.POSITIONAL_OR_KEYWORD
    plain = all(p.kind == required and p.default is inspect.Parameter.empty for p in parameters)
    return CallPattern(plain, False, frozenset())
