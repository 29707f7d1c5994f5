"""Watching a model run: which of its modules is at work, and the products with parameters that it calls."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fxprop.ops.reads import Product
from fxprop.tracing.observe.products import ProductMode
from fxprop.tracing.observe.twin import Twin
from fxprop.tracing.source_lines import users_line

# (module at work, parameter, product, result, source line)
OnProduct = Callable[[str, str, Product, Any, str | None], None]
OnCall = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]


class Watch:
    """Hooks on every module of a twin, and a mode that sees products."""

    def __init__(self, twin: Twin, on_call: OnCall, on_product: OnProduct) -> None:
        self._twin = twin
        self._on_call, self._on_product = on_call, on_product
        # the calls of modules at work, from the outermost: (name, how many-th call of it)
        self.stack: list[tuple[str, int]] = []
        self._counts: Counter[str] = Counter()
        # the stack where an error came from
        self.failed: list[tuple[str, int]] | None = None
        # inside a graph that is being recorded node by node
        self.muted = 0
        # while something is looked at that the model does not do
        self.aside = False

    @property
    def at(self) -> str | None:
        """The innermost module whose forward is running."""
        return self.stack[-1][0] if self.stack else None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for as long as the context lasts."""
        handles = []
        for module in self._twin.root.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        parameters = dict(self._twin.root.named_parameters())
        try:
            with ProductMode(parameters, self._product):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._twin.names[id(module)]
        self.stack.append((name, self._counts[name]))
        self._counts[name] += 1
        if not self.muted:
            self._on_call(name, module, args, kwargs)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if sys.exc_info()[0] is not None and self.failed is None:
            self.failed = list(self.stack)
        self.stack.pop()

    def _product(self, name: str, product: Product, dense: Callable[[], Any]) -> Any:
        result = dense()
        if not self.muted and self.at is not None:
            self._on_product(self.at, name, product, result, users_line(1) or None)
        return result
