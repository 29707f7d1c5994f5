"""What every sparse operator does before its backward: argument checks, overrides, autocast."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from fxprop.errors import OpError
from fxprop.ops.compiling import is_compiling
from fxprop.ops.function import autocast_device
from fxprop.ops.keep import Keep
from fxprop.ops.scores import get_score
from fxprop.ops.selections import SELECTIONS
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
    check_choices(op, keep)
    shares = SELECTIONS[keep.select].counts_batch
    # of no use where each gradient has its own
    if (keep.k_input is None or keep.k_weight is None) and not (_is_amount(keep.k, shares) and keep.k):
        raise OpError(f"{op}: k={keep.k!r}: expected an integer of at least 1 (k >= n is dense)")
    for name, k in (("k_input", keep.k_input), ("k_weight", keep.k_weight)):
        if k is not None and not _is_amount(k, shares):
            raise OpError(f"{op}: {name}={k!r}: expected an integer of at least 0 (0 is no gradient)")
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


def _is_amount(k: object, shares: bool) -> bool:
    is_share = shares and isinstance(k, float) and 0 <= k <= 1
    return is_share or (isinstance(k, int) and not isinstance(k, bool) and k >= 0)


def _is_distributed(tensor: Tensor) -> bool:
    # not imported, which takes a second: whoever has such a tensor has imported it
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def check_choices(op: str, keep: Keep) -> None:
    """Raise OpError for a keyword that is none of the words it may be."""
    for name, words in CHOICES.items():
        if getattr(keep, name) not in words:
            raise OpError(f"{op}: {name}={getattr(keep, name)!r}: expected one of {', '.join(words)}")


def is_dense(keep: Keep, n: int, example: int | None, *tensors: Tensor | None) -> bool:
    """Whether to call the dense operator on these tensors.

    True where `keep` keeps all of n channels, or of the entries in an example (None: not known), for both
    gradients, and where there will be no sparse backward.
    """
    amounts = (keep.k,) if keep.is_one else (keep.of_input, keep.of_weight)
    keeps_all = SELECTIONS[keep.select].keeps_all
    return all(keeps_all(k, n, example) for k in amounts) or not needs_backward(*tensors)


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an operator on these tensors, and a sparse backward can take its place.

    It cannot where a tensor is nested or sparse, which only the dense operator can handle, or empty, so
    that there is nothing to choose from.
    """
    given = [t for t in tensors if t is not None]
    # inference mode may have gradients enabled, and saves nothing all the same (dynamo cannot ask for it)
    inference = not is_compiling() and torch.is_inference_mode_enabled()
    if not (torch.is_grad_enabled() and not inference and any(t.requires_grad for t in given)):
        return False
    if any(t.is_nested or t.layout != torch.strided for t in given):
        return False
    # asked of a size that is free, it would fix it
    return is_compiling() or all(t.numel() > 0 for t in given)


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
