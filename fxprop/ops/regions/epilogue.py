"""An operator and what lies between it and the gradient that arrives, with one backward for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprop.ops.compiling import is_compiling
from fxprop.ops.form import Form, Gradients, Operands, Pair
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
    and where what is kept cannot be told from sums over channels alone.
    """
    return (
        input.device.type != "cpu"
        or is_compiling()
        or keep.select != "channel"
        or keep.score not in FROM_SUMS
        # what is kept for the one gradient is then no part of what is kept for the other
        or keep.score_weight
        # nothing is left to compute together
        or keep.larger.k == 0
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
    if keep.of_input == 0:
        input = input.detach()  # so that nothing upstream is computed for it
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
        keep, (*of_layer, needs_bias) = ctx.keep, ctx.keep.needs(ctx.needs_input_grad[3:6])
        needed, needs_own = tuple(of_layer), ctx.needs_input_grad[6:]
        arrived = Arrived(
            grad_output, weight, tuple(saved), ctx.chain, needed, needs_bias, tuple(needs_own)
        )
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            behind = ctx.epilogue.behind(ctx.form, keep.larger, arrived)
            of = Operands(input, weight, (), needed)
            *pair, grad_bias = _of_layer(ctx.form, keep, behind, of)
        used = [t for t in (grad_output, input, weight, *saved) if t is not None and t.requires_grad]
        return None, None, None, *refuse_double_backward((*pair, grad_bias, *behind.own), used)


def _of_layer(form: Form, keep: Keep, behind: Behind, of: Operands) -> Gradients:
    """Of the operator's input, weight and bias, each from what is kept for it."""
    kept, grad, grad_bias, _ = behind
    if kept is None or grad is None:
        return None, None, grad_bias
    if keep.is_one:
        return *form.from_kept(grad, kept, of, keep), grad_bias
    # in every run of channels the highest scores come first
    runs = torch.arange(len(kept), device=kept.device).view(-1, int(keep.larger.k))

    def part(k: int, needed: tuple[bool, bool]) -> Pair:
        if not any(needed):
            return None, None
        at = runs[:, :k].flatten()
        of_part = grad if len(at) == len(kept) else form.take(grad, at, of)
        return form.from_kept(of_part, kept[at], of._replace(needed=needed), keep.only(k))

    grad_input, _ = part(int(keep.of_input), (of.needed[0], False))
    _, grad_weight = part(int(keep.of_weight), (False, of.needed[1]))
    if grad_bias is not None and keep.bias_grad == "selected":
        grad_bias = grad_bias.index_fill(0, kept[runs[:, int(keep.of_weight) :].flatten()], 0)
    return grad_input, grad_weight, grad_bias
