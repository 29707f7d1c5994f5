"""The sparse products: `torch.matmul`, `addmm` and `einsum` with meProp's backward.

One operand is the weight. The indices that it shares with the output alone are the output features,
which selection chooses from; an index of both operands and the output is a batch of separate weights, each
with its own choice, as the groups of a convolution.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from fxprop.errors import OpError
from fxprop.ops.common import (
    SparseFunction,
    autocast,
    autocast_device,
    check_keep,
    needs_backward,
    refuse_double_backward,
    sparse,
)
from fxprop.ops.select import Keep, channel_scores, mask_elements
from fxprop.settings import KeepArgs

# keywords that no product has
_WITHOUT = ("norm_grad", "weight_grad", "chained")

# which operand is the weight
WeightSide = Literal["left", "right"]


class Indices(NamedTuple):
    """The indices of a product of an input and a weight, one letter each."""

    input: str
    weight: str
    output: str

    @property
    def batch(self) -> str:
        """In both operands and the output: separate weights."""
        return "".join(i for i in self.weight if i in self.input and i in self.output)

    @property
    def features(self) -> str:
        """In the weight and the output alone."""
        return "".join(i for i in self.weight if i not in self.input)

    @property
    def contracted(self) -> str:
        """In both operands alone."""
        return "".join(i for i in self.weight if i not in self.output)

    @property
    def rows(self) -> str:
        """In the input and the output alone."""
        return "".join(i for i in self.input if i not in self.weight)

    def problem(self) -> str | None:
        """Why this product has no sparse backward; None if it has one."""
        for of in self:
            if len(set(of)) < len(of):
                return "an index is repeated in one operand"
        if set(self.output) - set(self.input + self.weight):
            return "an index of the output is in no operand"
        if (set(self.rows) | set(self.features)) - set(self.output):
            return "an index is summed in one operand alone"
        return None if self.features else "the weight has no output features"


def matmul_indices(input_dims: int, weight_dims: int, weight: WeightSide) -> Indices:
    """The indices of `torch.matmul`; batch dimensions are taken to be of equal size."""
    letters = iter(string.ascii_letters)
    contracted = next(letters)
    row = next(letters) if input_dims > 1 else ""
    feature = next(letters) if weight_dims > 1 else ""
    batch = "".join(next(letters) for _ in range(max(input_dims, weight_dims, 2) - 2))
    matrices = {
        "right": (row + contracted, contracted + feature),
        "left": (contracted + row, feature + contracted),
    }
    of_input, of_weight = matrices[weight]
    in_order = row + feature if weight == "right" else feature + row
    return Indices(
        batch[len(batch) - max(input_dims - 2, 0) :] + of_input,
        batch[len(batch) - max(weight_dims - 2, 0) :] + of_weight,
        batch + in_order,
    )


def einsum_indices(equation: str, weight: WeightSide) -> Indices | None:
    """The indices of a two-operand einsum; None for one that is written in another way."""
    operands, arrow, output = equation.replace(" ", "").partition("->")
    left, comma, right = operands.partition(",")
    if not comma or "," in right or "." in equation:
        return None
    if not arrow:
        # as einsum: the indices that appear once, in alphabetical order
        output = "".join(sorted(i for i in set(left + right) if (left + right).count(i) == 1))
    return Indices(left, right, output) if weight == "right" else Indices(right, left, output)


class _Form(NamedTuple):
    """Which dense function a product is, so that its forward is the same to the bit."""

    function: Literal["matmul", "einsum", "addmm"]
    weight: WeightSide
    indices: Indices
    equation: str = ""
    beta: float = 1
    alpha: float = 1


def _dense(input: Tensor, weight: Tensor, bias: Tensor | None, form: _Form) -> Tensor:
    if form.function == "addmm":
        assert bias is not None
        return torch.addmm(bias, input, weight, beta=form.beta, alpha=form.alpha)
    left, right = (input, weight) if form.weight == "right" else (weight, input)
    if form.function == "einsum":
        return torch.einsum(form.equation, left, right)
    return torch.matmul(left, right)


class _SparseProduct(SparseFunction):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, form: _Form, keep: Keep) -> Tensor:
        output = _dense(input, weight, bias, form)
        # a view would be refused by in-place activations; see ops/linear.py
        result: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, ctx.form, ctx.keep = inputs
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(autocast_device(grad_output), enabled=False):
            grads = _backward(
                grad_output, input, weight, ctx.bias_shape, ctx.form, ctx.keep, ctx.needs_input_grad
            )
        return (*refuse_double_backward(grads, (grad_output, input, weight)), None, None)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_shape: torch.Size | None,
    form: _Form,
    keep: Keep,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_input, needs_weight, needs_bias = needs[:3]
    of = form.indices
    batch, rows, features, contracted = of.batch, of.rows, of.features, of.contracted
    grad = _arrange(grad_output, of.output, batch, rows, features)
    bias_grad = None
    if needs_bias and keep.bias_grad == "full":
        assert bias_shape is not None
        bias_grad = form.beta * grad_output.sum_to_size(bias_shape)
        needs_bias = False
    if not (needs_input or needs_weight or needs_bias):
        return None, None, bias_grad

    w = _arrange(weight, of.weight, batch, contracted, features)
    kept = None
    if keep.select == "element":
        grad = mask_elements(grad.flatten(0, 1), keep).view(grad.shape)
        kept_weight = w
    else:
        # [rows, batch, features]: scores reduce a leading dimension
        scores = channel_scores(grad.transpose(0, 1), (0,), keep)
        kept = scores.topk(min(keep.k, scores.shape[1]), dim=1).indices  # [batch, k]
        grad, kept_weight = _take(grad, kept), _take(w, kept)
    grad_input = grad_weight = None
    if needs_input:
        found = grad.bmm(kept_weight.transpose(1, 2))  # [batch, rows, contracted]
        grad_input = form.alpha * _restore(found, of.input, batch, rows, contracted, input.shape)
    if needs_weight:
        x = _arrange(input, of.input, batch, rows, contracted)
        found = x.transpose(1, 2).bmm(grad)  # [batch, contracted, features]
        if kept is not None:
            found = _spread(found, kept, w.shape)
        grad_weight = form.alpha * _restore(found, of.weight, batch, contracted, features, weight.shape)
    if needs_bias:
        assert bias_shape is not None
        whole = grad if kept is None else _spread(grad, kept, (*grad.shape[:2], w.shape[2]))
        whole = _restore(whole, of.output, batch, rows, features, grad_output.shape)
        bias_grad = form.beta * whole.sum_to_size(bias_shape)
    return grad_input, grad_weight, bias_grad


def _arrange(tensor: Tensor, letters: str, first: str, second: str, third: str) -> Tensor:
    """`tensor` with its indices in the given order, as [first, second, third]."""
    ordered = tensor.permute([letters.index(i) for i in first + second + third])
    sizes = iter(ordered.shape)
    shape = [_product([next(sizes) for _ in part]) for part in (first, second, third)]
    return ordered.reshape(shape)


def _restore(
    tensor: Tensor, letters: str, first: str, second: str, third: str, shape: torch.Size
) -> Tensor:
    """The inverse of `_arrange`."""
    order = [letters.index(i) for i in first + second + third]
    split = tensor.reshape([shape[i] for i in order])
    return split.permute([order.index(i) for i in range(len(order))])


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


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


def _run(input: Tensor, weight: Tensor, bias: Tensor | None, form: _Form, keep: Keep) -> Tensor:
    name = form.function
    check_keep(name, keep, weight)
    if (input.dim(), weight.dim()) != (len(form.indices.input), len(form.indices.weight)):
        return _dense(input, weight, bias, form)  # which says what is wrong
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
    of_features = _product([sizes[i] for i in form.indices.features])
    if keep.k >= of_features or not needs_backward(input, weight, bias):
        return _dense(input, weight, bias, form)
    input, weight, bias = autocast(input, weight, bias)
    output: Tensor = _SparseProduct.apply(input, weight, bias, form, keep)
    return output


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
    keep = Keep.given("matmul", settings, (*_WITHOUT, "bias_grad"))
    x, w = (input, other) if weight == "right" else (other, input)
    return _run(x, w, None, _Form("matmul", weight, matmul_indices(x.dim(), w.dim(), weight)), keep)


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
    keep = Keep.given("addmm", settings, _WITHOUT)
    form = _Form("addmm", "right", Indices("ri", "if", "rf"), beta=beta, alpha=alpha)
    return _run(mat1, mat2, input, form, keep)


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
    keep = Keep.given("einsum", settings, (*_WITHOUT, "bias_grad"))
    indices = einsum_indices(equation, weight) if len(operands) == 2 else None
    if indices is None:
        raise OpError(
            f"einsum {equation!r}: expected two operands with every index named, such as 'ni,io->no'"
        )
    x, w = operands if weight == "right" else reversed(operands)
    return _run(x, w, None, _Form("einsum", weight, indices, equation), keep)
