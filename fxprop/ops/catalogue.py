"""The operators: one record each, with all that is known of the dense function it stands in for.

`read` takes apart a call of a dense function, be it of tensors or of graph nodes; `arguments` puts the
parts together again as the sparse operator takes them. Another operator is another record here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprop.errors import OpError
from fxprop.ops import axes, convolution, reads, registered
from fxprop.ops.axes import Axes, Shapes
from fxprop.ops.grouped_mm import WITHOUT as WITHOUT_GROUPED_MM
from fxprop.ops.grouped_mm import grouped_mm
from fxprop.ops.linear import WITHOUT as WITHOUT_LINEAR
from fxprop.ops.linear import linear
from fxprop.ops.products import WITHOUT, WITHOUT_ADDMM, addmm, einsum, matmul
from fxprop.ops.reads import Product, Reads


@dataclass(frozen=True)
class Operator:
    """What is known of a dense function and its sparse operator, of the same name."""

    sparse: Callable[..., Any]
    dense: Callable[..., Any]
    # keywords that the operator lacks
    without: tuple[str, ...]
    # its axes, or why it has no sparse backward
    axes: Callable[[Shapes], Axes | str]
    # calls that are this function
    reads: tuple[Reads, ...] = ()
    # module classes that compute it, and the attributes that are its constants
    modules: tuple[type[nn.Module], ...] = ()
    attributes: tuple[str, ...] = ()

    @property
    def takes_bias(self) -> bool:
        """Whether it has a bias, and so a gradient of one."""
        return "bias_grad" not in self.without

    @property
    def name(self) -> str:
        """ "conv2d", as in generated code."""
        return self.sparse.__name__


_aten = torch.ops.aten
_CONV = ("stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("stride", "padding", "output_padding", "groups", "dilation")


def _everywhere(*names: str) -> tuple[Any, ...]:
    """The functions of torch, methods of tensors and operators of aten with these names."""
    return tuple(
        function
        for name in names
        for function in (getattr(torch, name), getattr(torch.Tensor, name), getattr(_aten, name).default)
    )


def _convolution(dims: int, module: type[nn.Module]) -> Operator:
    name = f"conv{dims}d"
    sparse, dense, packet = (getattr(of, name) for of in (convolution, F, _aten))
    calls = Reads((dense, packet.default, packet.padding), reads.CONV, reads.plain(name))
    return Operator(sparse, dense, convolution.WITHOUT, axes.of_convolution, (calls,), (module,), _CONV)


def _transposed(dims: int, module: type[nn.Module]) -> Operator:
    name = f"conv_transpose{dims}d"
    sparse, dense, packet = (getattr(of, name) for of in (convolution, F, _aten))
    functions = (dense, packet.default if dims == 1 else packet.input)
    calls = Reads(functions, reads.CONV_TRANSPOSE, reads.plain(name))
    without = convolution.WITHOUT_TRANSPOSED
    return Operator(sparse, dense, without, axes.of_transposed, (calls,), (module,), _CONV_TRANSPOSE)


_LINEAR = Reads((F.linear, _aten.linear.default), reads.LINEAR, reads.plain("linear"))
_MATMUL = (
    Reads(
        # `a @ b`, as Python and as graphs have it
        (*_everywhere("matmul"), torch.Tensor.__matmul__, operator.matmul),
        reads.MATMUL,
        reads.read_matmul,
    ),
    Reads(_everywhere("mm", "bmm"), reads.MM, reads.read_matmul),
)
_ADDMM = Reads(_everywhere("addmm"), reads.ADDMM, reads.read_addmm)
_EINSUM = (
    Reads((torch.einsum,), reads.EINSUM, reads.read_einsum),
    Reads((_aten.einsum.default,), reads.ATEN_EINSUM, reads.read_einsum),
)
_GROUPED_MM = Reads(
    # the second is what the first calls inside torch.nn.functional
    (F.grouped_mm, torch._grouped_mm, _aten._grouped_mm.default),
    reads.GROUPED_MM,
    reads.read_grouped_mm,
)

OPERATORS = {
    of.name: of
    for of in (
        _convolution(1, nn.Conv1d),
        _convolution(2, nn.Conv2d),
        _convolution(3, nn.Conv3d),
        _transposed(1, nn.ConvTranspose1d),
        _transposed(2, nn.ConvTranspose2d),
        _transposed(3, nn.ConvTranspose3d),
        Operator(linear, F.linear, WITHOUT_LINEAR, axes.of_linear, (_LINEAR,), (nn.Linear,)),
        Operator(matmul, torch.matmul, WITHOUT, axes.of_matmul, _MATMUL),
        Operator(addmm, torch.addmm, WITHOUT_ADDMM, axes.of_addmm, (_ADDMM,)),
        Operator(einsum, torch.einsum, WITHOUT, axes.of_einsum, _EINSUM),
        Operator(grouped_mm, F.grouped_mm, WITHOUT_GROUPED_MM, axes.of_grouped_mm, (_GROUPED_MM,)),
    )
}

# module classes with a sparse operator
SITE_MODULES = {module: of for of in OPERATORS.values() for module in of.modules}

_READS = {
    function: how
    for how in (
        *(how for of in OPERATORS.values() for how in of.reads),
        # whose arguments tell which of the convolutions it is
        Reads(
            (torch.convolution, _aten.convolution.default), reads.ATEN_CONVOLUTION, reads.read_convolution
        ),
    )
    for function in how.functions
}


def arguments(product: Product) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the operator, without those that say what is kept."""
    constants = dict(product.constants)
    operands = (product.input, product.weight)
    if constants.get("weight") == "left":
        operands = (product.weight, product.input)
    if product.op == "einsum":
        return (constants.pop("equation"), *operands), constants
    if product.op == "addmm":
        return (product.bias, *operands), constants
    return (*operands, product.bias) if OPERATORS[product.op].takes_bias else operands, constants


def read(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]
) -> Product | None:
    """The product that this call computes with a weight, or None if it is none that has an operator.

    `is_weight` says which operand may be the weight of functions that do not name one.
    """
    if registered.is_registered(function):
        return _check(function, registered.read_function(function, args, kwargs))
    how = _READS.get(function) if isinstance(function, Hashable) else None
    if how is None:
        return None
    try:
        bound = how.signature.bind(*args, **kwargs)
    except TypeError:
        return None  # an overload with other arguments, such as out=
    bound.apply_defaults()
    return how.reader(bound, is_weight)


def read_module(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """What the reader registered for the module's class makes of a call."""
    return _check(type(module), registered.read_module(module, args, kwargs))


def _check(target: Any, product: Product | None) -> Product | None:
    if product is not None and product.op not in OPERATORS:
        raise OpError(
            f"the reader registered for {target!r} returned op={product.op!r}: expected one of "
            f"{', '.join(OPERATORS)}"
        )
    return product
