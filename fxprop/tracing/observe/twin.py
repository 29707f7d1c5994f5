"""A twin of a model and its example inputs that can be run without the model noticing.

By default of fake tensors, which have shapes, dtypes and devices but no data. A model that reads values
gets a twin of real tensors, which shares the parameters and has its own copies of buffers and inputs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

# not a public path, but the one torch's own documentation imports it from;
# tests/test_project.py notices if it moves
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import checkpoint

from fxprop.errors import InputError
from fxprop.pytree import tree_leaves, tree_map
from fxprop.tracing.compiled_parts import uncompile
from fxprop.tracing.module.copy_tree import copy_tree
from fxprop.tracing.module.generated_class import set_mode
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.module_kinds import NORMS_WITH_STATISTICS
from fxprop.tracing.observe.tensors import Made, storage_of
from fxprop.tracing.observe.untouched import PythonState, collecting, untouched

_SEED = 0


class _VisibleCheckpoint:
    """In place of the autograd function of `torch.utils.checkpoint` with use_reentrant=True.

    That one hides from autograd what it computes, and forbids torch.autograd.grad.
    """

    @staticmethod
    def apply(run_function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        with checkpoint.set_checkpoint_early_stop(False):
            return checkpoint.checkpoint(
                run_function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )


class Twin:
    """The twin of `root` and its inputs; everything in it may be changed.

    Every floating-point parameter of the twin requires grad, so that autograd's graph shows how the
    model hangs together whatever is frozen; `required` are those that really do.
    """

    def __init__(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, real: bool):
        self.real = real
        # shape environment: none, so that a size that depends on data is an error, not a guess
        self.mode = None if real else FakeTensorMode(allow_non_fake_inputs=True)
        device = model_device(root)
        # a model on meta has no device in mind; on cpu, tensors that its code makes on the way can mix
        # with it, as they will when it is real
        self.device = torch.device("cpu") if device is None or device.type == "meta" else device
        self._follow_model = device is not None and device.type == "meta"
        self.required: list[torch.Tensor] = []
        self.root = copy_tree(root, self._of_model)
        for module in self.root.modules():
            if isinstance(module, TracedModule):
                module._fx_warns_of_hooks = False  # hooks are what watches the run
            # momentum=None makes batch norm read a counter's value, which a fake tensor does not have
            if not real and isinstance(module, NORMS_WITH_STATISTICS) and module.momentum is None:
                module.momentum = 0.1
        uncompile(self.root)
        self.args: tuple[Any, ...] = self._of_input(args)
        self.kwargs: dict[str, Any] = self._of_input(dict(kwargs))
        self.names: dict[int, str] = {}
        for name, module in self.root.named_modules():
            self.names.setdefault(id(module), name)

    @contextlib.contextmanager
    def running(self, training: bool | None = None) -> Iterator[PythonState]:
        """Where the twin is run, once, in a mode: with autograd on and its mode active.

        No trace is left behind in what the twin shares with the model. Gives the state that tells
        afterwards what the run has changed.
        """
        with contextlib.ExitStack() as stack:
            # fake tensors log a traceback before they raise; our error says the same in one line
            logger = logging.getLogger(FakeTensorMode.__module__)
            stack.enter_context(mock.patch.object(logger, "disabled", True))
            devices = [self.device] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices))
            if self.real:
                torch.manual_seed(_SEED)
                stack.enter_context(collecting(True))  # what is left over has memory
                stack.enter_context(Made())  # parameters are the model's own
            if training is not None and training != self.root.training:
                stack.enter_context(untouched(self.root))
                with self.mode or contextlib.nullcontext():
                    set_mode(self.root, training)
            state = stack.enter_context(untouched(self.root, self.args, self.kwargs))
            stack.enter_context(self.mode or contextlib.nullcontext())
            stack.enter_context(torch.enable_grad())
            # a private class, by which alone checkpoint() reaches the function
            stack.enter_context(mock.patch.object(checkpoint, "CheckpointFunction", _VisibleCheckpoint))
            yield state

    def labels(self) -> dict[int, str]:
        """By storage: the names of the twin's parameters and buffers, and what its inputs are called."""
        inputs = tree_leaves((self.args, self.kwargs))
        tensors = {f"input {at}": value for at, value in enumerate(inputs)} | dict(
            (*self.root.named_buffers(), *self.root.named_parameters())
        )
        return {storage_of(t): name for name, t in tensors.items() if isinstance(t, torch.Tensor)}

    def _of_model(self, tensor: torch.Tensor) -> torch.Tensor:
        twin = self._copy(tensor, self.device if tensor.is_meta else tensor.device, own=False)
        if isinstance(tensor, nn.Parameter):
            twin = _as_parameter(twin)
        elif tensor.requires_grad:
            twin.requires_grad_(True)
        if tensor.requires_grad:
            self.required.append(twin)
        return twin

    def _of_input(self, value: Any) -> Any:
        def convert(leaf: Any) -> Any:
            if isinstance(leaf, torch.SymInt):
                return _hints([leaf])[0]
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if isinstance(leaf, nn.Parameter):
                return self._of_model(leaf)  # of a captured graph, whose parameters are inputs
            follow = leaf.is_meta or self._follow_model
            twin = self._copy(leaf, self.device if follow else leaf.device, own=True)
            if leaf.requires_grad:
                self.required.append(twin.requires_grad_(True))
            return twin

        return tree_map(convert, value)

    def _copy(self, tensor: torch.Tensor, device: torch.device, *, own: bool) -> torch.Tensor:
        if self.mode is None:
            shared = isinstance(tensor, nn.Parameter) and not own
            return tensor.detach() if shared else tensor.detach().clone()
        size, stride = _hints(tensor.size()), _hints(tensor.stride())
        # made directly: empty_strided under the mode takes eight times as long
        meta = torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")
        return FakeTensor(self.mode, meta, device)


def _hints(sizes: Sequence[Any]) -> list[int]:
    # a size that is free has the value it was seen with; int() would fix it for the graph, and torch has
    # no public way to see the value
    return [s if isinstance(s, int) else int(s.node.hint) for s in sizes]


def has_values(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the model and the inputs hold data that a run could read."""
    tensors = [*root.parameters(), *root.buffers(), *tree_leaves((args, dict(kwargs)))]
    return not any(
        isinstance(t, torch.Tensor) and (t.is_meta or isinstance(t, FakeTensor)) for t in tensors
    )


def _as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    can_require_grad = tensor.is_floating_point() or tensor.is_complex()
    if not isinstance(tensor, FakeTensor):
        return nn.Parameter(tensor, requires_grad=can_require_grad)
    # as nn.Parameter does with tensors of other classes, but of this one and not of a view of it
    tensor._is_param = True
    return tensor.requires_grad_(can_require_grad)


def model_device(module: nn.Module) -> torch.device | None:
    """The device of the module's first parameter or buffer; None if it has neither."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return None


def bind_placeholders(
    placeholders: list[fx.Node], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """One value per placeholder, as a call of the generated forward would bind them."""
    values: list[Any] = []
    positional, keywords = list(args), dict(kwargs)
    takes = ", ".join(str(node.target) for node in placeholders)
    for node in placeholders:
        name = str(node.target)
        if name.startswith("**"):
            values.append(keywords)
            keywords = {}
        elif name.startswith("*"):
            values.append(tuple(positional))
            positional = []
        elif positional:
            values.append(positional.pop(0))
        elif name in keywords:
            values.append(keywords.pop(name))
        elif node.args:
            values.append(node.args[0])
        else:
            raise InputError(f"the example inputs lack {name!r}: the model takes {takes}")
    if positional or keywords:
        extra = [describe(v) for v in positional] + list(keywords)
        raise InputError(
            f"the example inputs have {len(extra)} too many ({', '.join(extra)}): the model takes {takes}"
        )
    return values


def describe(value: Any) -> str:
    """A value as error messages show it: "float32[8, 3, 224, 224]" for a tensor."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


def describe_error(error: Exception) -> str:
    """The first line of what an error says; the name of its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe_all(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The tensors and other values in a call's inputs, as error messages show them."""
    return ", ".join(describe(value) for value in tree_leaves((args, dict(kwargs))))
