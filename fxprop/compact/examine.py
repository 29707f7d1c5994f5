"""Whether a model's backward can take part of a mini-batch: captured and cut, but not run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprop.compact.captured import batch_symbol, fresh, has_several, needs_backward
from fxprop.compact.compile import Found, examine_graph
from fxprop.compact.cut import CannotCut, Cut
from fxprop.errors import ExamplesError
from fxprop.pytree import tree_map


def examine(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Cut:
    """The cut in the backward of `module` on inputs of these shapes. Raises ExamplesError if there is none.

    Nothing runs: torch.compile and AOTAutograd trace with fake tensors, and are stopped there.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm):
            raise CannotCut(f"SyncBatchNorm {name!r} joins the examples of several processes")
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    given = tree_map(lambda leaf: _like(leaf, device), (args, dict(kwargs)))

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    with torch.enable_grad(), _off_meta(module):
        try:
            call_compiled(
                torch.compile(fresh(call), backend=_stop_at_cut, fullgraph=True), *given[0], **given[1]
            )
        except Found as found:
            return found.cut
    raise CannotCut("no gradient is computed: nothing of the model requires one")


@contextlib.contextmanager
def _off_meta(module: nn.Module) -> Iterator[None]:
    """With stand-ins on the CPU for tensors on the meta device, where some losses have no backward."""
    held: list[dict[str, Any]] = [d for part in module.modules() for d in (part._parameters, part._buffers)]
    before = [dict(tensors) for tensors in held]
    every = {t for tensors in before for t in tensors.values() if t is not None and t.is_meta}
    made = {tensor: _stand_in(tensor) for tensor in every}
    try:
        for tensors in held:
            tensors.update({name: made[t] for name, t in tensors.items() if t in made})
        yield
    finally:
        for tensors, kept in zip(held, before, strict=True):
            tensors.update(kept)


def _stand_in(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor, device="cpu")  # never touched, so that no memory is taken
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _like(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    made = torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
    return made.requires_grad_(leaf.requires_grad)


def _stop_at_cut(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    if not needs_backward(example_inputs):
        return gm.forward
    if not has_several(gm, example_inputs):
        raise CannotCut("the example inputs have one example, so that there is nothing to choose from")
    raise Found(examine_graph(gm, example_inputs, batch_symbol(gm, example_inputs)))


def call_compiled(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that torch.compile captures whole; what it logs while it is captured is left out.

    What torch.compile says of a model that it cannot capture whole becomes CannotCut.
    """
    try:
        with _explained():
            return compiled(*args, **kwargs)
    except CannotCut as error:
        if "ogger" not in str(error.__cause__):
            raise
    with torch._dynamo.config.patch(ignore_logging_functions=_logging_functions()), _explained():
        return compiled(*args, **kwargs)


def _logging_functions() -> set[Any]:
    """What models say while they run, which torch.compile would break a graph for."""
    methods = ("debug", "info", "warning", "warning_once", "info_once")  # the last two are transformers'
    return {getattr(logging.Logger, name) for name in methods if hasattr(logging.Logger, name)}


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    try:
        yield
    except BackendCompilerFailed as error:
        inner: BaseException | None = error.inner_exception
        if isinstance(inner, Found | ExamplesError):
            raise inner from None
        raise
    except TorchDynamoException as error:
        reason = " ".join(str(error).strip().splitlines()[0].split())
        raise CannotCut(f"torch.compile cannot capture the model in one graph: {reason}") from error
