"""The sparse products: `torch.matmul`, `addmm` and `einsum` with meProp's backward.

One operand is the weight. The indices that it shares with the output alone are the output features,
which selection chooses from; an index of both operands and the output is a batch of separate weights, each
with its own choice, as the groups of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor

from fxprop.errors import OpError
from fxprop.ops.calling import autocast, check_keep, is_dense, sparse
from fxprop.ops.engine import run
from fxprop.ops.entries.calls import Call, Tensors
from fxprop.ops.form import Form, Operands, Pair
from fxprop.ops.indices import Indices, WeightSide, einsum_indices, matmul_indices
from fxprop.ops.keep import Keep
from fxprop.ops.scores import channel_scores, l2_norms
from fxprop.settings import KeepArgs

# keywords of other operators
WITHOUT_ADDMM = ("norm_grad", "weight_grad", "chained")
WITHOUT = (*WITHOUT_ADDMM, "bias_grad")


@dataclass(frozen=True)
class Contraction(Form):
    """A call of a product, by the dense function that it is.

    Its backward has grad_output as [batch, rows, features], the input as [batch, rows, contracted] and the
    weight as [batch, contracted, features].
    """

    function: Literal["matmul", "einsum", "addmm"]
    weight: WeightSide
    indices: Indices
    equation: str = ""
    beta: float = 1
    alpha: float = 1

    rows_dim = 1

    def dense(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By the dense function itself, so that its output is the same to the bit."""
        if self.function == "addmm":
            assert bias is not None
            return torch.addmm(bias, input, weight, beta=self.beta, alpha=self.alpha)
        left, right = (input, weight) if self.weight == "right" else (weight, input)
        if self.function == "einsum":
            return torch.einsum(self.equation, left, right)
        return torch.matmul(left, right)

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        output = self.dense(input, weight, bias)
        # a view would be refused by in-place activations; see ops/linear.py
        result: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return result

    def arrange(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        of = self.indices
        return _arrange(grad_output, of.output, of.batch, of.rows, of.features)

    def arrange_input(self, input: Tensor) -> Tensor:
        of = self.indices
        return _arrange(input, of.input, of.batch, of.rows, of.contracted)

    def _arrange_weight(self, weight: Tensor) -> Tensor:
        of = self.indices
        return _arrange(weight, of.weight, of.batch, of.contracted, of.features)

    def restore(self, grads: Pair, of: Operands) -> Pair:
        i = self.indices
        grad_input, grad_weight = grads
        if grad_input is not None:
            grad_input = _restore(grad_input, i.input, i.batch, i.rows, i.contracted, of.input.shape)
            grad_input = self.alpha * grad_input
        if grad_weight is not None:
            parts = (i.batch, i.contracted, i.features)
            grad_weight = _restore(grad_weight, i.weight, *parts, of.weight.shape)
            grad_weight = self.alpha * grad_weight
        return grad_input, grad_weight

    def examples(self, grad: Tensor) -> Tensor:
        return grad.flatten(0, 1)

    def choices(self, grad: Tensor) -> int:
        return grad.shape[2]

    def weight_norms(self, weight: Tensor) -> Tensor:
        return l2_norms(self._arrange_weight(weight), (1,))  # [batch, features]

    def scores(self, grad: Tensor, keep: Keep, of: Operands) -> Tensor:
        # [rows, batch, features]: scores reduce a leading dimension
        return channel_scores(grad.transpose(0, 1), (0,), keep)

    def top(self, scores: Tensor, k: int) -> Tensor:
        return scores.topk(min(k, scores.shape[1]), dim=1).indices  # [batch, k]

    def take(self, grad: Tensor, kept: Tensor, of: Operands) -> Tensor:
        return _take(grad, kept)

    def from_kept(self, grad: Tensor, kept: Tensor, of: Operands, keep: Keep) -> Pair:
        w = self._arrange_weight(of.weight)
        grad_input, grad_weight = _products(grad, self.arrange_input(of.input), _take(w, kept), of)
        if grad_weight is not None:
            grad_weight = _spread(grad_weight, kept, w.shape)
        return self.restore((grad_input, grad_weight), of)

    def products(self, grad: Tensor, input: Tensor, weight: Tensor, of: Operands) -> Pair:
        return _products(grad, input, self._arrange_weight(weight), of)

    def as_call(self, grad: Tensor, of: Operands) -> tuple[Call, Tensors] | None:
        weight = self._arrange_weight(of.weight).transpose(1, 2)
        call = Call([], [], [], matrices=len(weight))
        input = self.arrange_input(of.input)
        return call, Tensors(grad.flatten(0, 1), input.flatten(0, 1), weight.flatten(0, 1))

    def of_call(self, grads: Pair, of: Operands) -> Pair:
        i = self.indices
        batch = math.prod([of.input.shape[i.input.index(letter)] for letter in i.batch])
        split = (None if grad is None else grad.reshape(batch, -1, grad.shape[1]) for grad in grads)
        grad_input, grad_weight = split
        return self.restore((grad_input, None if grad_weight is None else grad_weight.transpose(1, 2)), of)

    def bias(self, grad: Tensor, kept: Tensor | None, weight: Tensor, shape: torch.Size) -> Tensor:
        """Of addmm: a bias that broadcasts to [rows, features]."""
        whole = grad if kept is None else _spread(grad, kept, (*grad.shape[:2], weight.shape[1]))
        return self.beta * whole[0].sum_to_size(shape)


def _products(grad: Tensor, input: Tensor, weight: Tensor, of: Operands) -> Pair:
    return (
        grad.bmm(weight.transpose(1, 2)) if of.needed[0] else None,
        input.transpose(1, 2).bmm(grad) if of.needed[1] else None,
    )


def _arrange(tensor: Tensor, letters: str, first: str, second: str, third: str) -> Tensor:
    """`tensor` with its indices in the given order, as [first, second, third]."""
    ordered = tensor.permute([letters.index(i) for i in first + second + third])
    sizes = iter(ordered.shape)
    shape = [math.prod([next(sizes) for _ in part]) for part in (first, second, third)]
    return ordered.reshape(shape)


def _restore(
    tensor: Tensor, letters: str, first: str, second: str, third: str, shape: torch.Size
) -> Tensor:
    """The inverse of `_arrange`."""
    order = [letters.index(i) for i in first + second + third]
    split = tensor.reshape([shape[i] for i in order])
    return split.permute([order.index(i) for i in range(len(order))])


def _take(tensor: Tensor, kept: Tensor) -> Tensor:
    """The kept features of [batch, *, features]."""
    if len(kept) == 1:
        return tensor.index_select(2, kept[0])
    return tensor.gather(2, kept[:, None, :].expand(-1, tensor.shape[1], -1))


def _spread(tensor: Tensor, kept: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `_take`, zero where nothing was kept."""
    zeros = tensor.new_zeros(shape)
    if len(kept) == 1:
        return zeros.index_copy_(2, kept[0], tensor)
    return zeros.scatter_(2, kept[:, None, :].expand(-1, tensor.shape[1], -1), tensor)


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None, form: Contraction, keep: Keep) -> Tensor:
    name = form.function
    check_keep(name, keep, weight)
    if (input.dim(), weight.dim()) != (len(form.indices.input), len(form.indices.weight)):
        return form.dense(input, weight, bias)  # which says what is wrong
    problem = form.indices.problem()
    if problem is not None:
        raise OpError(
            f"{name} of input {list(input.shape)} and weight {list(weight.shape)}: {problem}; "
            "use the dense operator"
        )
    sizes = dict(zip(form.indices.input, input.shape, strict=True))
    for letter, size in zip(form.indices.weight, weight.shape, strict=True):
        if sizes.get(letter, size) != size:
            raise OpError(
                f"{name} of input {list(input.shape)} and weight {list(weight.shape)}: sizes differ, and "
                "broadcasting has no sparse backward; use the dense operator"
            )
        sizes[letter] = size
    features = math.prod([sizes[i] for i in form.indices.features])
    if is_dense(keep, features, features, input, weight, bias):
        return form.dense(input, weight, bias)
    return run(form, keep, *autocast(input, weight, bias))


@sparse
def matmul(
    input: Tensor,
    other: Tensor,
    *,
    weight: WeightSide = "right",
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.matmul` (also mm, bmm and @) whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.matmul(x, w, k=25)                    # x [*, in], w [in, out]: 25 of out
    >>> y = fxprop.ops.matmul(w, x, weight="left", k=25)     # w [out, in], x [in, n]

    Args:
        input, other: the operands; float64/32, bfloat16 or float16. A batched weight [B, in, out] with
            an input [B, *, in] keeps k of `out` for each of the B; nothing else is broadcast.
        weight: which operand is the weight.
        k, select, score: as in `fxprop.ops.linear`, over the weight's output features.

    The output is bit-equal to the dense operator's. Raises OpError for arguments it cannot take and on
    double backward. Source: meProp, 1706.06197, equations 5 to 8; "unified" form, section 3.3.
    """
    keep = Keep.given("matmul", settings, WITHOUT)
    x, w = (input, other) if weight == "right" else (other, input)
    return _multiply(
        x, w, None, Contraction("matmul", weight, matmul_indices(x.dim(), w.dim(), weight)), keep
    )


@sparse
def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.addmm` whose backward uses only the top-k part of grad_output; `mat2` is the weight.

    >>> y = fxprop.ops.addmm(bias, x, w, k=25)               # x [rows, in], w [in, out]: 25 of out

    The gradient of `input`, the bias, is that of all of grad_output, or with bias_grad="selected" of
    what was kept. The rest as in `matmul`.
    """
    keep = Keep.given("addmm", settings, WITHOUT_ADDMM)
    form = Contraction("addmm", "right", Indices("ri", "if", "rf"), beta=beta, alpha=alpha)
    return _multiply(mat1, mat2, input, form, keep)


@sparse
def einsum(
    equation: str,
    *operands: Tensor,
    weight: WeightSide = "right",
    **settings: Unpack[KeepArgs],
) -> Tensor:
    """`torch.einsum` of two operands whose backward uses only the top-k part of grad_output.

    >>> y = fxprop.ops.einsum("btd,dhk->bthk", x, w, k=25)   # 25 of the h * k output features

    `equation` names every index (no ellipsis); those of the weight and the output alone are the output
    features. The rest as in `matmul`.
    """
    keep = Keep.given("einsum", settings, WITHOUT)
    indices = einsum_indices(equation, weight) if len(operands) == 2 else None
    if indices is None:
        raise OpError(
            f"einsum {equation!r}: expected two operands with every index named, such as 'ni,io->no'"
        )
    x, w = operands if weight == "right" else reversed(operands)
    return _multiply(x, w, None, Contraction("einsum", weight, indices, equation), keep)
