"""The operators by name, and the dense functions they stand in for.

`read` takes apart a call of a dense function, be it of tensors or of graph nodes; `arguments` puts the
parts together again as the sparse operator takes them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprop.errors import OpError
from fxprop.ops import conv, conv_transpose
from fxprop.ops.grouped_mm import grouped_mm
from fxprop.ops.linear import linear
from fxprop.ops.product import addmm, einsum, matmul

OPERATORS: dict[str, Callable[..., Any]] = {
    "conv1d": conv.conv1d,
    "conv2d": conv.conv2d,
    "conv3d": conv.conv3d,
    "conv_transpose1d": conv_transpose.conv_transpose1d,
    "conv_transpose2d": conv_transpose.conv_transpose2d,
    "conv_transpose3d": conv_transpose.conv_transpose3d,
    "linear": linear,
    "matmul": matmul,
    "addmm": addmm,
    "einsum": einsum,
    "grouped_mm": grouped_mm,
}

_DENSE: dict[str, Callable[..., Any]] = {
    **{name: getattr(F, name) for name in OPERATORS if hasattr(F, name)},
    "matmul": torch.matmul,
    "addmm": torch.addmm,
    "einsum": torch.einsum,
}

# operators without a bias of their own
_NO_BIAS = ("matmul", "einsum", "grouped_mm")


@dataclass(frozen=True)
class Product:
    """A call of a dense function, taken apart: operands, and constants by the operator's keyword."""

    op: str
    input: Any
    weight: Any
    bias: Any = None
    constants: Mapping[str, Any] = field(default_factory=dict)


def takes_bias(op: str) -> bool:
    """Whether the operator has a bias, and so a `bias_grad`."""
    return op not in _NO_BIAS


def dense_function(op: str) -> Callable[..., Any]:
    """The function of torch that the operator mirrors."""
    return _DENSE[op]


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
    return (operands if product.op in _NO_BIAS else (*operands, product.bias)), constants


# --- reading calls ------------------------------------------------------------------------------------

_Read = Callable[[inspect.BoundArguments, Callable[[Any], bool]], Product | None]
_NO_VALUE = inspect.Parameter.empty


def _signature(**defaults: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
    )


_OPERANDS = {"input": _NO_VALUE, "weight": _NO_VALUE, "bias": None}
_CONV = _signature(**_OPERANDS, stride=1, padding=0, dilation=1, groups=1)
_CONV_TRANSPOSE = _signature(**_OPERANDS, stride=1, padding=0, output_padding=0, groups=1, dilation=1)
_LINEAR = _signature(**_OPERANDS)
_MATMUL = _signature(input=_NO_VALUE, other=_NO_VALUE)
_MM = _signature(input=_NO_VALUE, mat2=_NO_VALUE)
_ADDMM = _signature(input=_NO_VALUE, mat1=_NO_VALUE, mat2=_NO_VALUE, beta=1, alpha=1)
_GROUPED_MM = _signature(mat_a=_NO_VALUE, mat_b=_NO_VALUE, offs=None, bias=None, out_dtype=None)
_EINSUM = inspect.Signature(
    [
        inspect.Parameter("equation", inspect.Parameter.POSITIONAL_ONLY),
        inspect.Parameter("operands", inspect.Parameter.VAR_POSITIONAL),
    ]
)
_ATEN_EINSUM = _signature(equation=_NO_VALUE, operands=_NO_VALUE, path=None)
_ATEN_CONVOLUTION = _signature(
    **dict.fromkeys(("input", "weight", "bias", "stride", "padding", "dilation"), _NO_VALUE),
    transposed=False,
    output_padding=(0,),
    groups=1,
)


def _plain(op: str) -> _Read:
    """Functions that name their weight."""

    def read(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
        constants = dict(bound.arguments)
        input, weight, bias = (constants.pop(name) for name in _OPERANDS)
        return Product(op, input, weight, bias, constants)

    return read


def _read_matmul(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    left, right = bound.args
    if is_weight(right):
        return Product("matmul", left, right, constants={"weight": "right"})
    return Product("matmul", right, left, constants={"weight": "left"}) if is_weight(left) else None


def _read_addmm(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    bias, mat1, mat2, beta, alpha = bound.args
    scales = {name: value for name, value in (("beta", beta), ("alpha", alpha)) if value != 1}
    return Product("addmm", mat1, mat2, bias, scales) if is_weight(mat2) else None


def _read_einsum(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    equation, operands = bound.arguments["equation"], bound.arguments["operands"]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = operands[0]
    weights = [is_weight(operand) for operand in operands]
    if not isinstance(equation, str) or len(operands) != 2 or not any(weights):
        return None
    left, right = operands
    if weights[1]:
        return Product("einsum", left, right, constants={"equation": equation, "weight": "right"})
    return Product("einsum", right, left, constants={"equation": equation, "weight": "left"})


def _read_grouped_mm(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    mat_a, mat_b, offs, bias, out_dtype = bound.args
    unusual = offs is None or bias is not None or out_dtype is not None
    if unusual or not is_weight(mat_b):
        return None
    return Product("grouped_mm", mat_a, mat_b, constants={"offs": offs})


def _read_convolution(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    constants = dict(bound.arguments)
    input, weight, bias = (constants.pop(name) for name in _OPERANDS)
    dims = len(constants["stride"])
    transposed = constants.pop("transposed")
    if not transposed:
        del constants["output_padding"]
    op = f"conv{'_transpose' if transposed else ''}{dims}d"
    return Product(op, input, weight, bias, constants)


_aten = torch.ops.aten
_READERS: dict[Any, tuple[inspect.Signature, _Read]] = {
    F.linear: (_LINEAR, _plain("linear")),
    _aten.linear.default: (_LINEAR, _plain("linear")),
    _aten.convolution.default: (_ATEN_CONVOLUTION, _read_convolution),
    torch.convolution: (_ATEN_CONVOLUTION, _read_convolution),
    torch.einsum: (_EINSUM, _read_einsum),
    _aten.einsum.default: (_ATEN_EINSUM, _read_einsum),
    F.grouped_mm: (_GROUPED_MM, _read_grouped_mm),
    _aten._grouped_mm.default: (_GROUPED_MM, _read_grouped_mm),
}
for _dims in (1, 2, 3):
    _name, _packet = f"conv{_dims}d", getattr(_aten, f"conv{_dims}d")
    for _function in (getattr(F, _name), _packet.default, _packet.padding):
        _READERS[_function] = (_CONV, _plain(_name))
    _name = f"conv_transpose{_dims}d"
    _packet = getattr(_aten, _name)
    for _function in (getattr(F, _name), _packet.default if _dims == 1 else _packet.input):
        _READERS[_function] = (_CONV_TRANSPOSE, _plain(_name))
for _function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, _aten.matmul.default):
    _READERS[_function] = (_MATMUL, _read_matmul)
for _packet_name in ("mm", "bmm"):
    _packet = getattr(_aten, _packet_name)
    for _function in (
        getattr(torch, _packet_name),
        getattr(torch.Tensor, _packet_name),
        _packet.default,
    ):
        _READERS[_function] = (_MM, _read_matmul)
for _function in (torch.addmm, torch.Tensor.addmm, _aten.addmm.default):
    _READERS[_function] = (_ADDMM, _read_addmm)
# what `a @ b` is called in a graph, and grouped_mm inside torch.nn.functional
_READERS[operator.matmul] = (_MATMUL, _read_matmul)
_READERS[torch._grouped_mm] = (_GROUPED_MM, _read_grouped_mm)


def read(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]
) -> Product | None:
    """The product that this call computes with a weight, or None if it is none that has an operator.

    `is_weight` says which operand may be the weight of functions that do not name one.
    """
    if isinstance(function, Hashable) and function in _CUSTOM:
        return _checked(function, _CUSTOM[function](*args, **kwargs))
    if function not in _READERS:
        return None
    signature, reader = _READERS[function]
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return None  # an overload with other arguments, such as out=
    bound.apply_defaults()
    return reader(bound, is_weight)


# --- users' own layers and functions --------------------------------------------------------------------

# for a module class: (module, *args, **kwargs) of its call; for a function: its args and kwargs
Reader = Callable[..., Product | None]

_CUSTOM: dict[Any, Reader] = {}
_CUSTOM_MODULES: dict[type[nn.Module], Reader] = {}


def register_site(target: type[nn.Module] | Callable[..., Any], reader: Reader) -> None:
    """Tell fxprop that a module class or a function computes a product with a weight.

    >>> fxprop.register_site(
    ...     MyLinear,      # its forward computes F.linear(x, self.kernel, self.shift)
    ...     lambda module, x: fxprop.ops.Product("linear", x, weight="kernel", bias="shift"),
    ... )
    >>> fxprop.register_site(
    ...     my_ops.project,      # a function that stays one call in graphs (torch.fx.wrap, custom ops)
    ...     lambda x, w: fxprop.ops.Product("matmul", x, w, constants={"weight": "right"}),
    ... )

    `reader` gets what the call gets (a module reader the module first), with graph nodes in place of
    tensors, and returns a `Product`: the name of the operator it is, its operands and the operator's
    constants. A module's parameters are named by strings. It returns None for a call that is none.
    Layers of a registered class are replaced by that operator where they are rewritten; that the two
    compute the same is the caller's word. Raises OpError if `target` is registered already.
    """
    table: dict[Any, Reader] = _CUSTOM_MODULES if isinstance(target, type) else _CUSTOM
    if target in table:
        raise OpError(f"{target!r} is already registered with fxprop")
    table[target] = reader


def is_registered(function: Any) -> bool:
    """Whether `register_site` was called for a function."""
    return isinstance(function, Hashable) and function in _CUSTOM


def registered_classes() -> tuple[type[nn.Module], ...]:
    """The module classes that `register_site` was called for."""
    return tuple(_CUSTOM_MODULES)


def read_module(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """What the reader registered for the module's class makes of a call."""
    reader = next(reader for cls, reader in _CUSTOM_MODULES.items() if isinstance(module, cls))
    return _checked(type(module), reader(module, *args, **kwargs))


def _checked(target: Any, product: Product | None) -> Product | None:
    if product is not None and product.op not in OPERATORS:
        raise OpError(
            f"the reader registered for {target!r} returned op={product.op!r}: expected one of "
            f"{', '.join(OPERATORS)}"
        )
    return product
