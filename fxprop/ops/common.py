"""What the sparse linear and convolution operators share: argument checks, autocast, double backward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from fxprop.errors import OpError
from fxprop.ops.select import Keep, get_score
from fxprop.settings import CHOICES, WeightGrad

F = TypeVar("F", bound=Callable[..., Any])


def public(function: F) -> F:
    """Name `function` by the package it is imported from.

    fx writes `function.__module__` into generated code; `fxprop_ops_conv2d` should not change when a
    file is split.
    """
    function.__module__ = "fxprop.ops"
    return function


def sparse(function: F) -> F:
    """A public operator that hands itself over where an argument overrides torch's functions.

    So torch.fx records a call of it as one node, as it is written.
    """
    overridable: Any = wrap_torch_function(_arguments)(function)
    operator: F = public(overridable)
    return operator


def _arguments(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return (*args, *kwargs.values())


def check_keep(op: str, keep: Keep, weight: Tensor) -> None:
    """Raise OpError or PolicyError unless `keep` and `weight` are something `op` can use."""
    if isinstance(keep.k, bool) or not isinstance(keep.k, int) or keep.k < 1:
        raise OpError(f"{op}: k={keep.k!r}: expected an integer of at least 1 (k >= n is dense)")
    check_choices(op, keep)
    get_score(keep.score)
    if type(weight) not in (Tensor, nn.Parameter) and _is_distributed(weight):
        raise OpError(
            f"{op}: weight is a {type(weight).__name__}, spread over processes, and a sparse backward "
            "needs the whole of it. For fully_shard: name the modules that it is put on in "
            "preserve_modules=[...] of fxprop.transform, so that they are called and gather their "
            "parameters. For tensor parallelism: keep the layer as a module call with "
            "leaf_modules=[...]; it stays dense"
        )
    if weight.is_complex():
        raise OpError(
            f"{op}: weight is {weight.dtype}: complex tensors have no sparse backward; "
            "use the dense operator"
        )


def _is_distributed(tensor: Tensor) -> bool:
    # not imported, which takes a second: whoever has such a tensor has imported it
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def check_choices(op: str, keep: Keep) -> None:
    """Raise OpError for a keyword that is none of the words it may be."""
    for name, words in CHOICES.items():
        if getattr(keep, name) not in words:
            raise OpError(f"{op}: {name}={getattr(keep, name)!r}: expected one of {', '.join(words)}")


def of_all_rows(rows: Tensor, kept: Tensor, weight: Tensor, keep: Keep) -> Tensor:
    """The weight's gradient, which is `rows` at the indices `kept` and zero elsewhere.

    With weight_grad="row_sparse" a coalesced sparse tensor with one sparse dimension, as the gradient of
    `torch.nn.functional.embedding(sparse=True)`; dense all the same under torch.compile, which has none.
    """
    if keep.weight_grad == "dense" or torch.compiler.is_compiling():
        return torch.zeros_like(weight).index_copy_(0, kept, rows)
    ascending, order = kept.sort()
    # by the indices' making they are in range and ascending; torch warns of checks left undecided
    with torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
        return torch.sparse_coo_tensor(ascending[None], rows[order], weight.shape, is_coalesced=True)


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an operator on these tensors, and a sparse backward can take its place.

    None can where a tensor is nested or sparse, which only the dense operator knows what to do with, or
    empty, so that there is nothing to choose from.
    """
    given = [t for t in tensors if t is not None]
    # inference mode may have gradients enabled, and saves nothing all the same (dynamo cannot ask for it)
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    if not (torch.is_grad_enabled() and not inference and any(t.requires_grad for t in given)):
        return False
    if any(t.is_nested or t.layout != torch.strided for t in given):
        return False
    # asked of a size that is free, it would fix it
    return torch.compiler.is_compiling() or all(t.numel() > 0 for t in given)


def autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: WeightGrad = "dense"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the dtype that autocast would give the dense operator.

    Done outside the autograd function so that the cast's own backward returns gradients in the
    parameters' dtype. Like autocast itself it leaves float64 alone.
    """
    device = autocast_device(input)
    if not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    if weight_grad == "row_sparse" and weight.dtype == torch.float32 != dtype:
        weight = _CastWithSparseGradient.apply(weight, dtype)
    return cast(input), cast(weight), None if bias is None else cast(bias)


class _CastWithSparseGradient(torch.autograd.Function):
    """`tensor.to(dtype)`, whose own backward refuses a sparse gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = tensor.dtype
        return tensor.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


_USE_INSTEAD = "Use fxprop.restore(gm), or a rule with keep=1.0 for the layers concerned"


def autocast_device(tensor: Tensor) -> str:
    """The device type to ask for autocast; the meta device has none, and says so by an error."""
    return "cpu" if tensor.is_meta else tensor.device.type


class SparseFunction(torch.autograd.Function):
    """What all sparse operators derive from: refuses vmap, which none of them has."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        """Refuse: one selection is made for the whole mini-batch, which vmap would take apart."""
        raise OpError(
            "vmap over a sparse backward is not defined: fxprop selects once for the whole mini-batch. "
            f"{_USE_INSTEAD}; without gradients, vmap under torch.no_grad()"
        )


class _RefuseDoubleBackward(SparseFunction):
    """Hands on the first `count` tensors, as if they were computed from all of them."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise OpError(
            "double backward through a sparse backward is not defined: fxprop's top-k selection is not "
            f"differentiable. {_USE_INSTEAD}"
        )


def refuse_double_backward(
    grads: tuple[Tensor | None, ...], computed_from: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """`grads`, so marked that differentiating them raises an OpError that says what to do."""
    if not torch.is_grad_enabled():
        return grads
    present = [grad.to_dense() if grad.is_sparse else grad for grad in grads if grad is not None]
    marked = iter(_RefuseDoubleBackward.apply(len(present), *present, *computed_from))
    return tuple(None if grad is None else next(marked) for grad in grads)
