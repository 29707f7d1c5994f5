"""The symbolic front-end: an nn.Module in, its graphs out, by torch.fx tracing.

Takes any nn.Module (or GraphModule, whose graph is used as it is). The model is never changed: a copy of
its module tree is traced. Knows nothing of sparsity.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxprop.errors import InputError, TraceError
from fxprop.tracing.compiled_parts import uncompile
from fxprop.tracing.module.copy_tree import copy_tree
from fxprop.tracing.module.generated_class import set_mode
from fxprop.tracing.module.stored import Graphs, copy_graphs
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.observe.tensors import Made, is_random, storage_of, tensors_in
from fxprop.tracing.observe.untouched import AUTOCAST, draws, global_state_kept, tensors_kept, untouched
from fxprop.tracing.source_lines import first_line, source_line, users_line
from fxprop.tracing.tracer import LeafModules, SiteTracer, the_model


class TracedGraphs(NamedTuple):
    """What tracing a module gave."""

    graphs: Graphs
    # why one mode has no graph; empty if both have
    untraced: str
    # tensors that the code makes once, by the name under which the graphs fetch them from the module
    constants: Mapping[str, Any]


def trace_modes(
    model: nn.Module, given: Mapping[str, Any] | None = None, leaf_modules: LeafModules = ()
) -> TracedGraphs:
    """The graphs of `model` in its present mode and, where the code differs, in the other one.

    >>> traced = trace_modes(torchvision.models.resnet18().train())
    >>> traced.graphs[True] is traced.graphs[False]
    True

    `given` maps argument names to example values; see `bind_arguments`. Arguments with a default that
    are not given, and given values that are not tensors, are fixed to their values, which the graph
    checks at run time; None fixes nothing. Raises TraceError naming the module and source line that
    stopped it; if only the other mode cannot be traced, returns why.
    """
    if isinstance(model, TracedModule):
        return TracedGraphs(copy_graphs(model.fx_graphs), model.fx_untraced, {})
    tree = copy_tree(model)
    uncompile(tree)
    here = model.training
    with tensors_kept(model), Made():
        if isinstance(model, fx.GraphModule):
            return TracedGraphs(_graphs_of(tree), "", {})
        first = _Trace(leaf_modules, given, tree)
        if not (first.reach.others or first.reach.reads_its_mode()):
            return TracedGraphs({here: first.graph, not here: first.graph}, "", first.constants)
        # of the traced copy, so that a constant has one name in both
        other_tree = copy_tree(tree)
        uncompile(other_tree)
        vars(other_tree).update(first.constants)
        try:
            with untouched(other_tree) as state:
                set_mode(other_tree, not here)
                changes = [change for change in state.changes() if "'training'" not in change]
                there = _Trace(leaf_modules, given, other_tree, like=first.graph)
        except TraceError as error:
            return TracedGraphs({here: first.graph}, str(error), first.constants)
    if changes and there.graph is not first.graph:
        raise TraceError(
            f"torch.fx cannot trace {the_model(model)}: switching its mode changes {changes[0]}, which its "
            "code reads"
        )
    return TracedGraphs({here: first.graph, not here: there.graph}, "", first.constants | there.constants)


def _graphs_of(twin: Any) -> Graphs:
    """The graphs that a GraphModule has in its two modes, for subclasses that switch."""
    here, graph = twin.training, copy.deepcopy(twin.graph)
    with contextlib.suppress(NotImplementedError):  # torch.export's modules have one mode
        set_mode(twin, not here)
    return {here: graph, not here: graph if same_graph(twin.graph, graph) else copy.deepcopy(twin.graph)}


class _Trace:
    """One trace of a tree, which is as before afterwards; TraceError if a graph would lose something."""

    def __init__(
        self,
        leaf_modules: LeafModules,
        given: Mapping[str, Any] | None,
        tree: nn.Module,
        like: fx.Graph | None = None,
    ) -> None:
        self._leaf_modules, self._given, self._tree = leaf_modules, given, tree
        with untouched(tree) as self._state:
            self._run(like)
        self.reach = self._state.reach

    def _run(self, like: fx.Graph | None) -> None:
        # with tensors that the code makes once, by the name under which the graph fetches them
        # (noting source lines takes longest: only for a graph that is new)
        self.graph, self.constants = self._traced(lines=like is None)
        if like is not None and same_graph(self.graph, like):
            self.graph, self.constants = like, {}
        elif like is not None:
            self.graph, self.constants = self._traced(lines=True)
        reach = self._state.reach
        if reach.others or reach.may_ask_for_surroundings():
            with _other_surroundings():
                elsewhere, _ = self._traced(lines=False)
            if not same_graph(elsewhere, self.graph):
                raise TraceError(
                    f"torch.fx cannot trace {the_model(self._tree)}: {self._line_of_question(elsewhere)}: "
                    "its code asks whether gradients, autocast or inference mode are enabled, and a graph "
                    "would freeze the answer that it got while it was traced"
                )
        if _hands_out(self.graph, self.constants):
            raise TraceError(
                f"torch.fx cannot trace {the_model(self._tree)}: {first_line(type(self._tree).forward)}: "
                "it returns a tensor that it creates in each call; a graph would always return the same one"
            )

    def _traced(self, *, lines: bool) -> tuple[fx.Graph, dict[str, Any]]:
        tracer = SiteTracer(self._leaf_modules, self._given)
        tracer.record_stack_traces = lines
        with draws() as drawn, _FrozenValues(self._tree) as frozen:
            graph = tracer.trace(self._tree)
        constants = {name: vars(self._tree)[name] for name in tracer.fresh}
        made = {f"attribute {name!r} of the model" for name in tracer.fresh}
        changes = [change for change in self._state.changes() if change not in made]
        self._state.restore()
        faults = [
            *frozen.faults,
            *(
                f"{self._line(change)}: its code changes {change}, which a graph would not do"
                for change in changes
            ),
            *(
                f"{self._line(name)}: its code draws numbers from {name}, which a graph would do only once"
                for name in drawn
            ),
        ]
        if faults:
            raise TraceError(f"torch.fx cannot trace {the_model(self._tree)}: {'; '.join(faults[:3])}")
        return graph, constants

    def _line(self, told: str) -> str:
        """The line that does something to what `told` names."""
        name = told.partition("'")[2].partition("'")[0] or told.partition(".")[0]
        reach = self._state.reach
        lines = (reach.line_of(name), reach.line_of(told.rpartition(".")[2]))
        return next(filter(None, lines), first_line(type(self._tree).forward))

    def _line_of_question(self, elsewhere: fx.Graph) -> str:
        """Where the code asks for its surroundings, or else where it goes another way in others."""
        questions = (
            name for name in self._state.reach.names if name.startswith("is_") and "enabled" in name
        )
        nodes = zip(self.graph.nodes, elsewhere.nodes, strict=False)
        other_way = (node for node, other in nodes if (node.op, node.target) != (other.op, other.target))
        lines = [self._state.reach.line_of(name) for name in sorted(questions)]
        lines += [source_line(node.stack_trace) or "" for node in other_way]
        return next(filter(None, lines), first_line(type(self._tree).forward))


# what gives a view of its first argument
_VIEWS = frozenset(
    ("view", "reshape", "expand", "transpose", "permute", "t", "unsqueeze", "squeeze", "getitem", "detach")
) | frozenset(
    ("contiguous", "to", "flatten", "expand_as", "view_as", "narrow", "select", "float", "requires_grad_")
)


def _hands_out(graph: fx.Graph, constants: Mapping[str, Any]) -> bool:
    """Whether `graph` returns one of the tensors that it keeps, or a view of one."""
    waiting = [node for out in graph.nodes if out.op == "output" for node in out.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node.op == "get_attr" and node.target in constants:
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op.startswith("call") and node.args and (name in _VIEWS or node.target is OrderedDict):
            waiting += node.all_input_nodes
    return False


def same_graph(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs compute the same."""
    return len(one.nodes) == len(other.nodes) and all(
        a.op == b.op and a.target == b.target and str((a.args, a.kwargs)) == str((b.args, b.kwargs))
        for a, b in zip(one.nodes, other.nodes, strict=True)
    )


@contextlib.contextmanager
def _other_surroundings() -> Iterator[None]:
    """Where gradients are disabled if they are enabled here, and autocast is on if it is off."""
    with global_state_kept():
        torch.set_grad_enabled(not torch.is_grad_enabled())
        inference = not torch.is_inference_mode_enabled()
        for kind in AUTOCAST:
            torch.set_autocast_enabled(kind, not torch.is_autocast_enabled(kind))
        with contextlib.nullcontext() if torch.is_grad_enabled() else torch.inference_mode(inference):
            yield


class _FrozenValues(Made):  # type: ignore[no-untyped-call]
    """Refuses what code does to real tensors while it is traced if a graph would do it once for all."""

    def __init__(self, tree: nn.Module) -> None:
        super().__init__()
        named = (*tree.named_parameters(), *tree.named_buffers())
        self._state = {storage_of(tensor): name for name, tensor in named}
        self.faults: list[str] = []

    def called(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], written: list[torch.Tensor]
    ) -> Any:
        name = str(function).removesuffix(".default")
        read = [self._state.get(storage_of(tensor)) for tensor in tensors_in((*args, *kwargs.values()))]
        state = next((name for name in read if name is not None), None)
        if is_random(function):
            fault = (
                f"{name} draws random numbers that do not depend on the inputs; a graph would freeze them"
            )
        elif written:
            fault = f"{name} writes in place to a tensor that outlasts the call, which a graph would not do"
        elif state is not None:
            fault = f"{name} computes with {state!r}, whose current value a graph would freeze"
        else:
            return function(*args, **kwargs)
        self.faults.append(f"{users_line()}: {fault}")
        raise TraceError(fault)


def bind_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Example values by the argument names of `model.forward`; InputError if they do not fit it."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {error}"
        ) from error
    return dict(bound.arguments)
