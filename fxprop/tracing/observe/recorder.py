"""Running a graph node by node in place of its module's forward, noting each tensor on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.shape_prop import TensorMetadata

from fxprop.tracing.observe.records import GraphCall, Run, TensorInfo, tensor_info
from fxprop.tracing.observe.twin import bind_placeholders
from fxprop.tracing.observe.watch import Watch


class Notes:
    """What is noted on the way through a run, of which graphs are part."""

    watch: Watch

    def __init__(self, run: Run, required: set[int]) -> None:
        self._run, self._required = run, required
        # autograd functions in the order they were met; held, so that their ids stay theirs
        self._functions: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._clock = 0
        self._place = ""

    def tick(self) -> int:
        """The next moment of the run."""
        self._clock += 1
        return self._clock

    def failed_at(self, place: str) -> None:
        """Remember where the run stopped, for the error."""
        self._place = self._place or place

    def new_call(self, path: str) -> GraphCall:
        """The record of a call of the graph at `path`."""
        call = GraphCall()
        self._run.calls.setdefault(path, []).append(call)
        return call

    def function(self, tensor: torch.Tensor) -> int | None:
        """The number of the autograd function that made `tensor`."""
        function = tensor.grad_fn
        return None if function is None else self._number(function)

    def _number(self, function: Any) -> int:
        if id(function) not in self._numbers:
            self._numbers[id(function)] = len(self._functions)
            self._functions.append(function)
        return self._numbers[id(function)]

    def info(self, tensor: torch.Tensor) -> TensorInfo:
        """The record of `tensor`; who needs its gradient is settled when the run is done."""
        info, function = tensor_info(tensor), self.function(tensor)
        if function is not None:
            return Pending(**vars(info), function=function)
        return replace(info, requires_grad=id(tensor) in self._required)


@dataclass(frozen=True, kw_only=True)
class Pending(TensorInfo):
    """A TensorInfo whose requires_grad depends on what the autograd graph leads to."""

    function: int = field(compare=False)


class GraphRecorder:
    """Stands in for a traced module's forward: runs the graph node by node and notes each tensor."""

    def __init__(self, notes: Notes, path: str, module: nn.Module, graph: fx.Graph) -> None:
        self._notes, self._path = notes, path
        self._module, self._graph = module, graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # keyed by placeholder: fx's own argument handling would drop keyword-only names
        nodes = [node for node in self._graph.nodes if node.op == "placeholder"]
        # exported graphs take their inputs flattened; fx keeps how in its code generator, which is private:
        # the public `process_inputs` would drop keyword arguments
        codegen: Any = self._graph._codegen
        is_pytree = isinstance(codegen, fx.graph._PyTreeCodeGen)
        if is_pytree:
            spec = codegen.pytree_info.in_spec
            of_both = len(spec.children()) == 2 and spec.child(1).type is dict
            given = (args, dict(kwargs)) if of_both else args
            values = list(fx._pytree.tree_flatten_spec(given, spec))
        else:
            values = bind_placeholders(nodes, args, kwargs)
        interpreter = _Interpreter(self._module, self._graph, self._notes, self._path)
        environment = dict(zip(nodes, values, strict=True))
        for node, value in environment.items():
            interpreter.note(node, value)
        outputs = interpreter.run(initial_env=environment, enable_io_processing=False)
        return codegen.process_outputs(outputs) if is_pytree else outputs


class _Interpreter(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, notes: Notes, path: str) -> None:
        super().__init__(module, graph=graph)
        self._notes, self._call, self._path = notes, notes.new_call(path), path
        self._at: fx.Node | None = None
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        self._at = n
        for input_ in n.all_input_nodes:
            value = self.env.get(input_)
            if isinstance(value, torch.Tensor) and value._version != self._versions[input_]:
                self.note(input_, value)  # changed in place since, and so its part in autograd's graph
        watch = self._notes.watch
        # a module that is called may have products of its own; a node is recorded here
        muting = n.op != "call_module"
        watch.muted += muting
        try:
            value = super().run_node(n)
        except Exception:
            self._notes.failed_at(f" at {_place(n, self._path)}")
            raise
        finally:
            watch.muted -= muting
        self.note(n, value)
        if n.op.startswith("call_") and isinstance(value, torch.Tensor):
            self._call.order[n.name] = self._notes.tick()
            function = self._notes.function(value)
            if function is not None:
                self._call.functions[n.name] = function
                # holds the set alone: a hook that held the interpreter would keep the model alive for ever
                reached, name = self._call.reached, n.name
                on_gradient(value, lambda _: reached.add(name))
        elif n.op == "call_module":
            self._call.order[n.name] = self._notes.tick()
        return value

    def note(self, node: fx.Node, value: Any) -> None:
        """Record the tensor at `node`."""
        if isinstance(value, torch.Tensor):
            self._versions[node] = value._version
            self._call.outputs[node.name] = self._notes.info(value)
            node.meta["tensor_meta"] = _metadata(value)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # generated code passes fresh lists, which functions may change; the graph's own are immutable
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise AssertionError("placeholders are given in the initial environment")

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        watch = self._notes.watch
        watch.aside = True  # a parametrized weight is computed anew
        weight = getattr(self.fetch_attr(target), "weight", None)
        watch.aside = False
        if self._at is not None and isinstance(weight, torch.Tensor):
            self._call.weights[self._at.name] = self._notes.info(weight)
        return result


def _plain(value: Any) -> Any:
    """`value` with fx's immutable lists and dicts as ordinary ones."""
    if type(value) in (list, immutable_list):
        return [_plain(item) for item in value]
    if type(value) is tuple:
        return tuple(_plain(item) for item in value)
    if type(value) in (dict, immutable_dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def on_gradient(tensor: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> None:
    """Call `hook` when a gradient arrives at `tensor`."""
    tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _metadata(tensor: torch.Tensor) -> TensorMetadata:
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    memory_format = next((f for f in formats if tensor.is_contiguous(memory_format=f)), None)
    return TensorMetadata(
        tensor.shape, tensor.dtype, tensor.requires_grad, tensor.stride(), memory_format, False, {}
    )


def _place(node: fx.Node, path: str) -> str:
    if node.op == "call_module":
        return f"layer {'.'.join(filter(None, (path, str(node.target))))!r}"
    return f"node {node.name!r}" + (f" of {path!r}" if path else "")
