"""Running a graph node by node in place of its module's forward, noting each tensor on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.shape_prop import TensorMetadata

from fxprop.tracing.observe.records import GraphCall, TensorInfo
from fxprop.tracing.observe.twin import bind_placeholders
from fxprop.tracing.observe.watch import Watch


class Recording(Protocol):
    """The run that a graph is part of."""

    watch: Watch

    def new_call(self, path: str) -> GraphCall:
        """The record of a call of the graph at `path`."""

    def info(self, tensor: torch.Tensor) -> TensorInfo:
        """The record of a tensor."""

    def function(self, tensor: torch.Tensor) -> int | None:
        """The number of the autograd function that made a tensor."""

    def tick(self) -> int:
        """The next moment of the run."""

    def failed_at(self, place: str) -> None:
        """Remember where the run stopped."""


class GraphRecorder:
    """Stands in for a traced module's forward: runs the graph node by node and notes each tensor."""

    def __init__(self, recording: Recording, path: str, module: nn.Module, graph: fx.Graph) -> None:
        self._recording, self._path = recording, path
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
        call = self._recording.new_call(self._path)
        interpreter = _Interpreter(self._module, self._graph, self._recording, call, self._path)
        environment = dict(zip(nodes, values, strict=True))
        for node, value in environment.items():
            interpreter.note(node, value)
        outputs = interpreter.run(initial_env=environment, enable_io_processing=False)
        return codegen.process_outputs(outputs) if is_pytree else outputs


class _Interpreter(fx.Interpreter):
    def __init__(
        self, module: nn.Module, graph: fx.Graph, recording: Recording, call: GraphCall, path: str
    ) -> None:
        super().__init__(module, graph=graph)
        self._recording, self._call, self._path = recording, call, path
        self._at: fx.Node | None = None
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        self._at = n
        for input_ in n.all_input_nodes:
            value = self.env.get(input_)
            if isinstance(value, torch.Tensor) and value._version != self._versions[input_]:
                self.note(input_, value)  # changed in place since, and so its part in autograd's graph
        watch = self._recording.watch
        # a module that is called may have products of its own; a node is recorded here
        muting = n.op != "call_module"
        watch.muted += muting
        try:
            value = super().run_node(n)
        except Exception:
            self._recording.failed_at(f" at {_place(n, self._path)}")
            raise
        finally:
            watch.muted -= muting
        self.note(n, value)
        if n.op.startswith("call_") and isinstance(value, torch.Tensor):
            self._call.order[n.name] = self._recording.tick()
            function = self._recording.function(value)
            if function is not None:
                self._call.functions[n.name] = function
                # holds the set alone: a hook that held the interpreter would keep the model alive for ever
                on_gradient(value, partial(_note_reached, self._call.reached, n.name))
        elif n.op == "call_module":
            self._call.order[n.name] = self._recording.tick()
        return value

    def note(self, node: fx.Node, value: Any) -> None:
        """Record the tensor at `node`."""
        if isinstance(value, torch.Tensor):
            self._versions[node] = value._version
            self._call.outputs[node.name] = self._recording.info(value)
            node.meta["tensor_meta"] = _metadata(value)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # generated code passes fresh lists, which functions may change; the graph's own are immutable
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise AssertionError("placeholders are given in the initial environment")

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        watch = self._recording.watch
        watch.aside = True  # a parametrized weight is computed anew
        weight = getattr(self.fetch_attr(target), "weight", None)
        watch.aside = False
        if self._at is not None and isinstance(weight, torch.Tensor):
            self._call.weights[self._at.name] = self._recording.info(weight)
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


def _note_reached(reached: set[str], name: str, grad: torch.Tensor) -> None:
    reached.add(name)


def on_gradient(tensor: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> None:
    """Call `hook` when a gradient arrives at `tensor`."""
    tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _metadata(tensor: torch.Tensor) -> TensorMetadata:
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    memory_format = next(
        (f for f in formats if _can_be(tensor, f) and tensor.is_contiguous(memory_format=f)), None
    )
    return TensorMetadata(
        tensor.shape, tensor.dtype, tensor.requires_grad, tensor.stride(), memory_format, False, {}
    )


def _can_be(tensor: torch.Tensor, memory_format: torch.memory_format) -> bool:
    needs = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
    return needs is None or tensor.dim() == needs


def _place(node: fx.Node, path: str) -> str:
    if node.op == "call_module":
        return f"layer {'.'.join(filter(None, (path, str(node.target))))!r}"
    return f"node {node.name!r}" + (f" of {path!r}" if path else "")
