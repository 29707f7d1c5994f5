"""Users' own layers and functions that compute a product with a weight."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import nn

from fxprop.errors import OpError
from fxprop.ops.reads import Product

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
    constants. A module's parameters are named by strings. It returns None for a call that is no such
    product. Where layers of a registered class are rewritten, that operator takes their place; the caller
    promises that it computes the same. Raises OpError if `target` is registered already.
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


def read_function(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """What the reader registered for a function makes of a call."""
    return _CUSTOM[function](*args, **kwargs)


def read_module(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """What the reader registered for the module's class makes of a call."""
    reader = next(reader for cls, reader in _CUSTOM_MODULES.items() if isinstance(module, cls))
    return reader(module, *args, **kwargs)
