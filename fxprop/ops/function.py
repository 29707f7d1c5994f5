"""The autograd side of every sparse operator: no vmap, no double backward, gradients of kept rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fxprop.errors import OpError
from fxprop.ops.compiling import is_compiling
from fxprop.ops.keep import Keep

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


def of_all_rows(rows: Tensor, kept: Tensor, weight: Tensor, keep: Keep) -> Tensor:
    """The weight's gradient, which is `rows` at the indices `kept` and zero elsewhere.

    With weight_grad="row_sparse" a coalesced sparse tensor with one sparse dimension, as the gradient of
    `torch.nn.functional.embedding(sparse=True)`; dense all the same under torch.compile, which has none.
    """
    if keep.weight_grad == "dense" or is_compiling():
        return torch.zeros_like(weight).index_copy_(0, kept, rows)
    ascending, order = kept.sort()
    # by the indices' making they are in range and ascending; torch warns of checks left undecided
    with torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
        return torch.sparse_coo_tensor(ascending[None], rows[order], weight.shape, is_coalesced=True)
