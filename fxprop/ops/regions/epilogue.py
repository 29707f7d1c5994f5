"""An operator and what lies between it and the gradient that arrives, with one backward for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprop.ops.compiling import is_compiling
from fxprop.ops.form import Form, Operands, Pair
from fxprop.ops.function import SparseFunction, autocast_device, refuse_double_backward
from fxprop.ops.keep import Keep
from fxprop.ops.kernels.handover import ChainEnd
from fxprop.ops.scores import FROM_SUMS

Some = tuple[Tensor | None, ...]


class Arrived(NamedTuple):
    """What an epilogue's backward gets."""

    grad_output: Tensor
    # the operator's
    weight: Tensor
    # as `Epilogue.saved` has it
    saved: Some
    # what `Epilogue.chain` made
    chain: ChainEnd | None
    # which gradients are needed: of input and weight, of the bias, of each of the epilogue's own tensors
    needed: tuple[bool, bool]
    needs_bias: bool
    needs_own: tuple[bool, ...]


class Behind(NamedTuple):
    """What an epilogue makes of the gradient that arrives."""

    # indices of the kept channels, and the gradient of the operator's output there; None where not needed
    kept: Tensor | None
    grad: Tensor | None
    # gradients of the operator's bias and of the epilogue's own tensors
    bias: Tensor | None
    own: Some


class Epilogue(ABC):
    """Norm, activation or both. Only channels can be kept behind one."""

    @abstractmethod
    def forward(self, features: Tensor, *own: Tensor | None) -> tuple[Tensor, ...]:
        """The region's output, and what else the backward is made of."""

    @abstractmethod
    def saved(self, own: Some, outputs: tuple[Tensor, ...]) -> Some:
        """What of its own tensors and of `forward`'s outputs the backward needs."""

    def chain(self, keep: Keep) -> ChainEnd | None:
        """What the convolution behind is handed, if the backward reads only a part of its gradient."""
        return None

    @abstractmethod
    def behind(self, form: Form, keep: Keep, of: Arrived) -> Behind:
        """The backward, for the kept channels."""


def runs_apart(input: Tensor, keep: Keep) -> bool:
    """Whether a region's parts are called one after the other for this input.

    On devices other than the CPU, where it was not measured; under torch.compile, which fuses by itself;
    and where what is kept cannot be told from sums over channels.
    """
    return (
        input.device.type != "cpu"
        or is_compiling()
        or keep.select != "channel"
        or keep.score not in FROM_SUMS
    )


def run_region(
    form: Form,
    epilogue: Epilogue,
    keep: Keep,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *own: Tensor | None,
) -> Tensor:
    """The output of the operator and the epilogue, whose backward keeps what `keep` says.

    `own` are the epilogue's tensors that get gradients.
    """
    outputs = _SparseRegion.apply(form, epilogue, keep, input, weight, bias, *own)
    result: Tensor = outputs[0]
    return result


class _SparseRegion(SparseFunction):
    @staticmethod
    def forward(
        form: Form,
        epilogue: Epilogue,
        keep: Keep,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *own: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = epilogue.forward(form.forward(input, weight, bias), *own)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.form, ctx.epilogue, ctx.keep, input, weight, _, *own = inputs
        ctx.own = len(own)
        ctx.chain = ctx.epilogue.chain(ctx.keep)
        ctx.mark_non_differentiable(*output[1:])
        # or autograd would fill a tensor with zeros for each of them
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, *ctx.epilogue.saved(tuple(own), output))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Some:
        if grad_output is None:
            nothing: Some = (None,) * (6 + ctx.own)
            return nothing
        input, weight, *saved = ctx.chain.saved_of(ctx) if ctx.chain else ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *needs_own = ctx.needs_input_grad[3:]
        needed = needs_input, needs_weight
        arrived = Arrived(
            grad_output, weight, tuple(saved), ctx.chain, needed, needs_bias, tuple(needs_own)
        )
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            behind = ctx.epilogue.behind(ctx.form, ctx.keep, arrived)
            of = Operands(input, weight, (), needed)
            pair: Pair = None, None
            if behind.kept is not None and behind.grad is not None:
                pair = ctx.form.from_kept(behind.grad, behind.kept, of, ctx.keep)
        used = [t for t in (grad_output, input, weight, *saved) if t is not None and t.requires_grad]
        return None, None, None, *refuse_double_backward((*pair, behind.bias, *behind.own), used)
