"""Calls of torch's dense functions, taken apart: which operand is the input, which the weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Product:
    """A call of a dense function, taken apart: operands, and constants by the operator's keyword."""

    op: str
    input: Any
    weight: Any
    bias: Any = None
    constants: Mapping[str, Any] = field(default_factory=dict)


# (the call's arguments, which operand may be a weight) -> the product, or None if it is another
Reader = Callable[[inspect.BoundArguments, Callable[[Any], bool]], Product | None]


class Reads(NamedTuple):
    """How calls of some functions, which take the same arguments, are read."""

    functions: tuple[Any, ...]
    signature: inspect.Signature
    reader: Reader


_NO_VALUE = inspect.Parameter.empty


def _signature(**defaults: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
    )


_OPERANDS = {"input": _NO_VALUE, "weight": _NO_VALUE, "bias": None}
CONV = _signature(**_OPERANDS, stride=1, padding=0, dilation=1, groups=1)
CONV_TRANSPOSE = _signature(**_OPERANDS, stride=1, padding=0, output_padding=0, groups=1, dilation=1)
LINEAR = _signature(**_OPERANDS)
MATMUL = _signature(input=_NO_VALUE, other=_NO_VALUE)
MM = _signature(input=_NO_VALUE, mat2=_NO_VALUE)
ADDMM = _signature(input=_NO_VALUE, mat1=_NO_VALUE, mat2=_NO_VALUE, beta=1, alpha=1)
GROUPED_MM = _signature(mat_a=_NO_VALUE, mat_b=_NO_VALUE, offs=None, bias=None, out_dtype=None)
EINSUM = inspect.Signature(
    [
        inspect.Parameter("equation", inspect.Parameter.POSITIONAL_ONLY),
        inspect.Parameter("operands", inspect.Parameter.VAR_POSITIONAL),
    ]
)
ATEN_EINSUM = _signature(equation=_NO_VALUE, operands=_NO_VALUE, path=None)
ATEN_CONVOLUTION = _signature(
    **dict.fromkeys(("input", "weight", "bias", "stride", "padding", "dilation"), _NO_VALUE),
    transposed=False,
    output_padding=(0,),
    groups=1,
)


def plain(op: str) -> Reader:
    """Functions that name their weight."""

    def read(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
        constants = dict(bound.arguments)
        input, weight, bias = (constants.pop(name) for name in _OPERANDS)
        return Product(op, input, weight, bias, constants)

    return read


def read_matmul(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    left, right = bound.args
    if is_weight(right):
        return Product("matmul", left, right, constants={"weight": "right"})
    return Product("matmul", right, left, constants={"weight": "left"}) if is_weight(left) else None


def read_addmm(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    bias, mat1, mat2, beta, alpha = bound.args
    scales = {name: value for name, value in (("beta", beta), ("alpha", alpha)) if value != 1}
    return Product("addmm", mat1, mat2, bias, scales) if is_weight(mat2) else None


def read_einsum(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
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


def read_grouped_mm(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    mat_a, mat_b, offs, bias, out_dtype = bound.args
    unusual = offs is None or bias is not None or out_dtype is not None
    if unusual or not is_weight(mat_b):
        return None
    return Product("grouped_mm", mat_a, mat_b, constants={"offs": offs})


def read_convolution(bound: inspect.BoundArguments, is_weight: Callable[[Any], bool]) -> Product | None:
    constants = dict(bound.arguments)
    input, weight, bias = (constants.pop(name) for name in _OPERANDS)
    dims = len(constants["stride"])
    transposed = constants.pop("transposed")
    if not transposed:
        del constants["output_padding"]
    op = f"conv{'_transpose' if transposed else ''}{dims}d"
    return Product(op, input, weight, bias, constants)
