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
from fxprop.ops import axes, convolution, products, reads, registered
from fxprop.ops.axes import Axes, Shape
from fxprop.ops.grouped_mm import WITHOUT as WITHOUT_GROUPED_MM
from fxprop.ops.grouped_mm import grouped_mm
from fxprop.ops.linear import WITHOUT as WITHOUT_LINEAR
from fxprop.ops.linear import linear
from fxprop.ops.reads import Product, Reads


@dataclass(frozen=True)
class Operator:
    """What is known of a dense function and its sparse operator, of the same name."""

    sparse: Callable[..., Any]
    dense: Callable[..., Any]
    # keywords that the operator lacks
    without: tuple[str, ...]
    # (input's, weight's and output's shapes, constants) -> its axes, or why it has no sparse backward
    axes: Callable[[Shape | None, Shape, Shape | None, Mapping[str, Any]], Axes | str]
    # calls that are this function
    reads: tuple[Reads, ...] = ()
    # module classes that compute it, and the attributes that are its constants
    modules: tuple[type[nn.Module], ...] = ()
    attributes: tuple[str, ...] = ()
    takes_bias: bool = True

    @property
    def name(self) -> str:
        """ "conv2d", as in generated code."""
        return self.sparse.__name__


_aten = torch.ops.aten
_CONV = ("stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("stride", "padding", "output_padding", "groups", "dilation")


def _convolution(dims: int, module: type[nn.Module]) -> Operator:
    name = f"conv{dims}d"
    dense, packet = getattr(F, name), getattr(_aten, name)
    calls = Reads((dense, packet.default, packet.padding), reads.CONV, reads.plain(name))
    sparse = getattr(convolution, name)
    return Operator(
        sparse, dense, convolution.WITHOUT, axes.of_convolution, (calls,), (module,), attributes=_CONV
    )


def _transposed(dims: int, module: type[nn.Module]) -> Operator:
    name = f"conv_transpose{dims}d"
    dense, packet = getattr(F, name), getattr(_aten, name)
    functions = (dense, packet.default if dims == 1 else packet.input)
    return Operator(
        getattr(convolution, name),
        dense,
        convolution.WITHOUT_TRANSPOSED,
        axes.of_transposed,
        (Reads(functions, reads.CONV_TRANSPOSE, reads.plain(name)),),
        (module,),
        attributes=_CONV_TRANSPOSE,
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
        Operator(
            linear,
            F.linear,
            WITHOUT_LINEAR,
            axes.of_linear,
            (Reads((F.linear, _aten.linear.default), reads.LINEAR, reads.plain("linear")),),
            (nn.Linear,),
        ),
        Operator(
            products.matmul,
            torch.matmul,
            products.WITHOUT,
            axes.of_matmul,
            (
                Reads(
                    (
                        *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
                        *(_aten.matmul.default, operator.matmul),  # the latter is `a @ b` in a graph
                    ),
                    reads.MATMUL,
                    reads.read_matmul,
                ),
                Reads(
                    (
                        *(torch.mm, torch.Tensor.mm, _aten.mm.default),
                        *(torch.bmm, torch.Tensor.bmm, _aten.bmm.default),
                    ),
                    reads.MM,
                    reads.read_matmul,
                ),
            ),
            takes_bias=False,
        ),
        Operator(
            products.addmm,
            torch.addmm,
            products.WITHOUT_ADDMM,
            axes.of_addmm,
            (Reads((torch.addmm, torch.Tensor.addmm, _aten.addmm.default), reads.ADDMM, reads.read_addmm),),
        ),
        Operator(
            products.einsum,
            torch.einsum,
            products.WITHOUT,
            axes.of_einsum,
            (
                Reads((torch.einsum,), reads.EINSUM, reads.read_einsum),
                Reads((_aten.einsum.default,), reads.ATEN_EINSUM, reads.read_einsum),
            ),
            takes_bias=False,
        ),
        Operator(
            grouped_mm,
            F.grouped_mm,
            WITHOUT_GROUPED_MM,
            axes.of_grouped_mm,
            (
                Reads(
                    # the second is what the first calls inside torch.nn.functional
                    (F.grouped_mm, torch._grouped_mm, _aten._grouped_mm.default),
                    reads.GROUPED_MM,
                    reads.read_grouped_mm,
                ),
            ),
            takes_bias=False,
        ),
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
        return _checked(function, registered.read_function(function, args, kwargs))
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
    return _checked(type(module), registered.read_module(module, args, kwargs))


def _checked(target: Any, product: Product | None) -> Product | None:
    if product is not None and product.op not in OPERATORS:
        raise OpError(
            f"the reader registered for {target!r} returned op={product.op!r}: expected one of "
            f"{', '.join(OPERATORS)}"
        )
    return product
