"""One run of a traced module, forward and backward, on fake tensors: shapes and FLOPs without computing.

Takes a TracedModule and example inputs (real, fake or meta) and returns a `Run`. Allocates nothing of
the model's size and changes no tensor, no module and no random state. Knows nothing of sparsity.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

# not a public path, but the one torch's own documentation imports them from;
# tests/test_project.py notices if they move
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxprop.errors import InputError
from fxprop.frontends.fakes import (
    Fakes,
    bind_placeholders,
    describe,
    model_device,
    without_data_dependence,
)
from fxprop.frontends.module import TracedModule
from fxprop.frontends.tree import copy_tree


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor that was never computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass
class Run:
    """What one run of a graph on fake tensors showed."""

    # node name -> its output, where that is a tensor
    outputs: dict[str, TensorInfo] = field(default_factory=dict)
    # name of a call_module node -> its module's weight
    weights: dict[str, TensorInfo] = field(default_factory=dict)
    # names of the nodes whose output a gradient arrives at
    reached: set[str] = field(default_factory=set)
    forward_flops: int = 0
    backward_flops: int = 0


@torch.inference_mode(False)
def run_on_fakes(
    traced: TracedModule, graph: fx.Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Run:
    """Run `graph` (one of `traced`'s) and its backward from every output that requires grad.

    >>> traced = trace(torchvision.models.resnet18())
    >>> run = run_on_fakes(traced, traced.graph, (torch.empty(8, 3, 224, 224, device="meta"),), {})
    >>> run.outputs["conv1"].shape, run.backward_flops
    ((8, 64, 112, 112), 56162123776)

    Also notes each tensor's `tensor_meta` on the graph's nodes, as torch.fx's ShapeProp does. Gradients
    of all parameters and inputs that require them are counted. Raises InputError naming the layer if
    the model cannot run on the inputs.
    """
    # slow to import, and only needed here
    from torch.utils.flop_counter import FlopCounterMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = Fakes(mode, model_device(traced))
    module = copy_tree(traced.tree(), fakes.of_model)
    without_data_dependence(module)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    values = [fakes.of_input(v) for v in bind_placeholders(placeholders, args, kwargs)]
    counting = {torch.ops.aten.convolution_backward: _conv_backward_flops}
    run = Run()
    interpreter = _Recorder(module, graph, run)
    with _no_logging(), mode, torch.enable_grad():
        with FlopCounterMode(display=False, custom_mapping=counting) as forward:
            outputs = interpreter.run_on(values)
        run.forward_flops = forward.get_total_flops()
        losses = [t for t in pytree.tree_leaves(outputs) if _is_differentiable(t)]
        if losses and fakes.leaves:
            seeds = [torch.ones_like(t) for t in losses]
            # autograd.grad, not backward: nothing may be accumulated into a real parameter
            with FlopCounterMode(display=False, custom_mapping=counting) as backward:
                _backward(losses, fakes.leaves, seeds)
            run.backward_flops = backward.get_total_flops()
    return run


def _backward(losses: list[torch.Tensor], leaves: list[torch.Tensor], seeds: list[torch.Tensor]) -> None:
    try:
        torch.autograd.grad(losses, leaves, seeds, allow_unused=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the model's own backward fails on the example inputs: {reason}. Leave example_inputs out: "
            "the model is transformed without counting FLOPs."
        ) from error


@contextlib.contextmanager
def _no_logging() -> Iterator[None]:
    # fake tensors log a traceback before they raise; our error says the same in one line
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, run: Run) -> None:
        super().__init__(module, graph=graph)
        self._run = run
        self._at: fx.Node | None = None

    def run_on(self, values: list[Any]) -> Any:
        described = ", ".join(describe(value) for value in values)
        try:
            # keyed by placeholder: fx's own argument handling would drop keyword-only names
            nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
            environment = dict(zip(nodes, values, strict=True))
            for node, value in environment.items():
                self._note(node, value)
            return self.run(initial_env=environment, enable_io_processing=False)
        except InputError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            place = "" if self._at is None else f" at {_place(self._at)}"
            if isinstance(error, DataDependentOutputException):
                raise InputError(
                    f"the model reads the values of tensors{place}, and fxprop finds shapes with fake "
                    f"tensors, which have none ({reason}). Leave example_inputs out: the model is "
                    "transformed without counting FLOPs."
                ) from error
            raise InputError(
                f"the model cannot run on the example inputs ({described}): it fails{place}: {reason}. "
                "Pass inputs of the shape, dtype and device that the model takes."
            ) from error

    def run_node(self, n: fx.Node) -> Any:
        self._at = n
        value = super().run_node(n)
        self._note(n, value)
        if n.op.startswith("call_") and _is_differentiable(value):
            # holds the set alone: a hook that held the interpreter would keep the model alive for ever
            value.register_hook(partial(_note_reached, self._run.reached, n.name))
        return value

    def _note(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._run.outputs[node.name] = tensor_info(value)
            node.meta["tensor_meta"] = _metadata(value)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # generated code passes fresh lists, which functions may change; the graph's own are immutable
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise AssertionError("placeholders are given in the initial environment")

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        weight = getattr(self.fetch_attr(target), "weight", None)
        if self._at is not None and isinstance(weight, torch.Tensor):
            self._run.weights[self._at.name] = tensor_info(weight)
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


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def tensor_info(tensor: torch.Tensor) -> TensorInfo:
    """The record of `tensor`."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


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


def _place(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"layer {node.target!r}"
    return f"node {node.name!r}"


def _conv_backward_flops(
    grad_output: Any,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """2 per multiply-add for each gradient; torch's own formula counts dW `groups` times over."""
    spatial = input if transposed else grad_output  # the smaller side's positions each meet the kernel
    positions = spatial[0] * math.prod(spatial[2:])
    one = 2 * positions * math.prod(weight) if weight else 0
    return int(one) * (bool(output_mask[0]) + bool(output_mask[1]))
