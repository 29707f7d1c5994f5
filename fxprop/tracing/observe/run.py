"""One run of a traced model, forward and backward: shapes and FLOPs, on fake tensors where possible.

Takes a `Traced` model and example inputs (real, fake or meta) and returns a `Run`. Changes no tensor, no
module and no random state, and on fake tensors allocates nothing of the model's size. Knows nothing of
sparsity.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

# not a public path, but the one torch's own documentation imports them from;
# tests/test_project.py notices if they move
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fxprop.errors import InputError
from fxprop.ops.reads import Product
from fxprop.pytree import tree_leaves
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.module_kinds import is_users
from fxprop.tracing.observe.account import Account
from fxprop.tracing.observe.accounting import Observation, cannot_run, values_needed
from fxprop.tracing.observe.answers import Answering, Answers
from fxprop.tracing.observe.flop_formulas import FlopCounter
from fxprop.tracing.observe.products import describe_product, with_operands
from fxprop.tracing.observe.recorder import GraphRecorder, Notes, Pending, on_gradient
from fxprop.tracing.observe.records import Autograd, ProductCall, Run, TensorInfo
from fxprop.tracing.observe.twin import Twin, describe_all, describe_error, has_values, model_device
from fxprop.tracing.observe.untouched import draws
from fxprop.tracing.observe.watch import Watch
from fxprop.tracing.reach import Reach
from fxprop.tracing.traced import Traced


@torch.inference_mode(False)
def run_traced(traced: Traced, training: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """Run the model in a mode, and its backward from every output that requires grad.

    >>> traced = trace_model(torchvision.models.resnet18(), "auto", None)
    >>> run = run_traced(traced, True, (torch.empty(8, 3, 224, 224, device="meta"),), {})
    >>> run.calls[""][0].outputs["conv1"].shape, run.backward_flops
    ((8, 64, 112, 112), 56162123776)

    Also notes each tensor's `tensor_meta` on the graphs' nodes, as torch.fx's ShapeProp does. Gradients
    of all parameters and inputs that require them are counted. On fake tensors; if the model cannot run
    on those, or holds nothing but small modules of torch's, on real ones, where there are any. Raises
    InputError naming the layer if the model cannot run on the inputs.
    """
    known = traced.runs.get(training)
    if isinstance(known, Run):
        return known
    if _is_small(traced, args, kwargs) and has_values(traced.root, args, kwargs):
        with contextlib.suppress(InputError):  # of a dtype for which there are no kernels
            return replace(Recording(traced, training, args, kwargs, real=True).run(), real=False)
    try:
        if known is not None:
            raise known
        return Recording(traced, training, args, kwargs, real=False).run()
    except InputError:
        if not has_values(traced.root, args, kwargs):
            raise
        # a model that reads values; if the inputs are at fault, this says so in the model's own words
        return Recording(traced, training, args, kwargs, real=True).run()


# entries of parameters and inputs
_SMALL = 4_000_000, 100_000


def _is_small(traced: Traced, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a run on real tensors takes less time than one on fake tensors, and shows the same.

    It does if no code but torch's own is left, which reads no values and leaves no trace.
    """
    root, device = traced.root, model_device(traced.root)
    inputs = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    weights, given = (sum(t.numel() for t in tensors) for tensors in (root.parameters(), inputs))
    if device is None or device.type != "cpu" or weights > _SMALL[0] or given > _SMALL[1]:
        return False
    graphs = (graph for piece in traced.pieces.values() for graph in piece.fx_graphs.values())
    called = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return not (any(map(is_users, called)) or Reach(root).functions)


class Recording(Notes):
    """One run of a traced model; dropped with the autograd graph when it is done."""

    def __init__(
        self,
        traced: Traced,
        training: bool,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        real: bool,
        answers: Answers | None = None,
        compared: bool = False,
    ) -> None:
        self._twin = Twin(traced.root, args, kwargs, real=real)
        super().__init__(
            Run(real=real or answers is not None), {id(tensor) for tensor in self._twin.required}
        )
        self._compared = compared
        # what a run on real tensors read: in one on fake tensors it is read again
        self._answers = answers
        # the account of the forward, if it is to be held against the model's
        self.observation = Observation()
        self._training = training
        self._opaque = traced.opaque
        self.watch = Watch(self._twin, self._note_call, self._note_product)
        # not by path: a switch of modes may take a module out of the model
        self._recorded: list[TracedModule] = []
        for path in traced.pieces:
            piece = self._twin.root.get_submodule(path)
            assert isinstance(piece, TracedModule)
            graph = traced.pieces[path].fx_graphs.get(training)
            if graph is not None:
                piece.__dict__["forward"] = GraphRecorder(self, path, piece, graph)
                self._recorded.append(piece)

    def run(self, *, backward: bool = True) -> Run:
        """Run it; see `run_traced`."""
        twin, run = self._twin, self._run
        with twin.running(self._training) as state:
            answering: contextlib.AbstractContextManager[Any] = (
                contextlib.nullcontext() if self._answers is None else Answering(self._answers)
            )
            with answering, FlopCounter() as forward, self.watch.watching():
                outputs = self._forward()
            run.forward_flops = forward.total
            self._note_used()
            for piece in self._recorded:
                # what is computed again in the backward is no other call
                del vars(piece)["forward"]
            losses = [t for t in _tensors(outputs) if t.requires_grad]
            self._number_all(losses)
            required = [tensor for tensor in twin.required if tensor.requires_grad]
            if backward and losses and required:
                with FlopCounter() as counter:
                    self._backward(losses, required)
                run.backward_flops = counter.total
        self.observation.changes = list(state.changed)
        self._settle()
        return run

    def _forward(self) -> Any:
        twin, observation = self._twin, self.observation
        given = describe_all(twin.args, twin.kwargs)
        try:
            with draws() as drawn, contextlib.ExitStack() as stack:
                if self._compared:
                    observation.ops = stack.enter_context(Account(self.watch, twin.labels())).ops
                outputs = twin.root(*twin.args, **twin.kwargs)
            observation.drawn = drawn
            return outputs
        except Exception as error:
            observation.error, observation.failed = error, self.watch.failed or []
            if isinstance(error, InputError):
                raise
            if not self._place and self.watch.at:
                self._place = f" at layer {self.watch.at!r}"
            if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
                raise values_needed(self._place, error) from error
            raise cannot_run(given, self._place, error) from error

    def _backward(self, losses: list[torch.Tensor], required: list[torch.Tensor]) -> None:
        try:
            # autograd.grad, not backward: nothing may be accumulated into a real parameter
            seeds = [torch.ones_like(t) for t in losses]
            torch.autograd.grad(losses, required, seeds, allow_unused=True)
        except Exception as error:
            raise InputError(
                f"the model's own backward fails on the example inputs: {describe_error(error)}. Leave "
                "example_inputs out: the model is transformed without counting FLOPs."
            ) from error

    def _note_used(self) -> None:
        """Where gradients have arrived so far, they are a part of the forward."""
        for calls in self._run.calls.values():
            for call in calls:
                call.used |= call.reached
        for record in self._run.products:
            record.used = record.reached

    # --- what is noted on the way -------------------------------------------------------------------

    def _note_call(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if name in self._opaque:
            self._run.opaque.setdefault(name, self.tick())

    def _note_product(
        self, module: str, parameter: str, product: Product, result: Any, source: str | None
    ) -> None:
        if not isinstance(result, torch.Tensor) or not isinstance(product.input, torch.Tensor):
            return
        record = ProductCall(
            module,
            parameter,
            describe_product(product, self.info),
            self.info(result),
            self.tick(),
            self.function(result),
            source,
        )
        self._run.products.append(record)
        if result.requires_grad:
            on_gradient(result, lambda _: setattr(record, "reached", True))

    # --- when it is done ----------------------------------------------------------------------------

    def _number_all(self, losses: list[torch.Tensor]) -> None:
        """Number every function that those of `losses` and the recorded ones lead to."""
        for loss in losses:
            self.function(loss)
        following: dict[int, tuple[int, ...]] = {}
        for at, function in enumerate(self._functions):  # which grows on the way
            following[at] = tuple(self._number(f) for f, _ in function.next_functions if f is not None)
        self._run.autograd = Autograd(following)

    def _settle(self) -> None:
        leaves = [
            number
            for number, function in enumerate(self._functions)
            if id(getattr(function, "variable", None)) in self._required
        ]
        requiring = self._run.autograd.requiring(leaves)

        def settle(info: Any) -> Any:
            if not isinstance(info, Pending):
                return info
            return TensorInfo(info.shape, info.dtype, info.function in requiring, info.device)

        for calls in self._run.calls.values():
            for call in calls:
                call.outputs = {name: settle(info) for name, info in call.outputs.items()}
                call.weights = {name: settle(info) for name, info in call.weights.items()}
        for record in self._run.products:
            record.output = settle(record.output)
            record.product = with_operands(record.product, settle)
        # they hold what a forward has saved for a backward, and this holds them until cycles are collected
        self._functions.clear()


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """Every tensor in what a model returns, in dataclasses and mappings of any class too."""
    tensors: list[torch.Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping):
            tensors += _tensors(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf):
            tensors += _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return tensors
