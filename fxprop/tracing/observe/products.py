"""Products with a parameter in code that has no graph, seen as they are called.

A `TorchFunctionMode` sees every function of torch that Python calls. It follows which tensors are
parameters or computed from parameters alone, so that `F.linear(x, self.w[expert])` is known for what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxprop.ops.attention import decomposed_forward
from fxprop.ops.catalogue import read
from fxprop.ops.reads import Product

# (name of the parameter, the product, how to compute it as it stands) -> its result
OnProduct = Callable[[str, Product, Callable[[], Any]], Any]


class ProductMode(TorchFunctionMode):
    """Calls `on_product` in place of every product with one of `parameters` (name -> tensor)."""

    def __init__(self, parameters: Mapping[str, Tensor], on_product: OnProduct) -> None:
        super().__init__()
        self._on_product = on_product
        # by id; the tensor itself is kept, so that an id cannot be reused
        self._known: dict[int, tuple[str, Tensor]] = {id(t): (n, t) for n, t in parameters.items()}
        # those that were picked by an index, as the rows of an embedding are: they depend on data
        self._picked: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, MethodWrapperType):  # an attribute, such as the shape
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                self._follow(args, kwargs, result)
            return result
        static = kwargs.get("static_k"), kwargs.get("static_v")
        if func is F.multi_head_attention_forward and static == (None, None):
            # a function of Python, inside which no mode is active
            with self:
                return decomposed_forward(*args, **kwargs)
        product = read(func, args, kwargs, self._is_known)
        if product is not None and self._is_known(product.weight) and self._is_data(product.input):
            name = self._known[id(product.weight)][0]
            return self._on_product(name, product, lambda: func(*args, **kwargs))
        result = func(*args, **kwargs)
        self._follow(args, kwargs, result)
        return result

    def _is_known(self, value: Any) -> bool:
        return id(value) in self._known

    def _is_data(self, value: Any) -> bool:
        """Whether it is no parameter: a product of parameters is what a weight is computed by, no layer."""
        return id(value) not in self._known or id(value) in self._picked

    def _follow(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """A result of known tensors alone is known too."""
        origin: tuple[str, Tensor] | None = None
        picked = False
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                known = self._known.get(id(tensor))
                picked = picked or self._is_data(tensor)
                if known is None:
                    # an index is not what a weight is computed from
                    if tensor.is_floating_point():
                        return
                elif origin is None or _size(known[1]) > _size(origin[1]):
                    origin = known
        if origin is None:
            return
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._known[id(tensor)] = (origin[0], tensor)
                if picked:
                    self._picked.add(id(tensor))


def _size(tensor: Tensor) -> tuple[int, int]:
    """What decides which of several parameters a computed weight is named by: the matrix, not its scale."""
    return tensor.dim(), tensor.numel()


def with_operands(product: Product, convert: Callable[[Any], Any]) -> Product:
    """`product` with `convert` of each of its operands in its place."""
    return replace(
        product, input=convert(product.input), weight=convert(product.weight), bias=convert(product.bias)
    )


def describe_product(product: Product, describe: Callable[[Tensor], Any]) -> Product:
    """`product` with a record in place of each tensor."""

    def convert(value: Any) -> Any:
        return describe(value) if isinstance(value, torch.Tensor) else value

    constants = {name: convert(value) for name, value in product.constants.items()}
    return replace(with_operands(product, convert), constants=constants)
