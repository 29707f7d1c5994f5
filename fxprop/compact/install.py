"""A module whose calls go through the cut backward: `forward` on the instance, in place of its class's."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprop.compact.choice import Choice
from fxprop.compact.compile import Compact
from fxprop.compact.examine import call_compiled
from fxprop.errors import ExamplesError
from fxprop.pytree import tree_leaves

# more than a program changes its policy
_REMEMBERED = 64


class CompactForward:
    """What a call of a module does while its backward takes part of the mini-batch.

    Lies in the module's `__dict__` as `forward`, so copies and pickles of the module have it too.
    """

    def __init__(self, module: nn.Module, choice: Choice, own: Callable[..., Any] | None) -> None:
        self.choice = choice
        # a forward that was on the instance before
        self.own = own
        self._module = module
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise ExamplesError(
                "torch.compile of a module that fxprop.transform gave a share of examples would run its "
                "backward on all of them. Compile the model itself with "
                "torch.compile(model, backend=fxprop.backend(policy))"
            )
        plain = self._plain()
        if not self._needs_backward(args, kwargs):
            return plain(*args, **kwargs)
        if self.choice.is_full():
            self.choice.last = None
            return plain(*args, **kwargs)
        return call_compiled(self._of(plain), plain, args, kwargs)

    def _plain(self) -> Callable[..., Any]:
        return self.own or types.MethodType(type(self._module).forward, self._module)

    @property
    def __code__(self) -> types.CodeType:
        # dynamo asks a GraphModule's forward for it, wherever it lies
        code: types.CodeType = getattr(self._plain(), "__code__")  # noqa: B009
        return code

    def _needs_backward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        given = (leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor))
        return any(t.requires_grad for t in (*self._module.parameters(), *given))

    def _of(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        # a compiled function for each version of the code: torch.compile bounds the versions of one
        key = getattr(plain, "__func__", plain)
        if key not in self._compiled:
            if len(self._compiled) >= _REMEMBERED:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[key] = torch.compile(fresh(_call), backend=Compact(self.choice), fullgraph=True)
        return self._compiled[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": {}}


def _call(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return plain(*args, **kwargs)


def fresh(function: Any) -> types.FunctionType:
    """The same function with a code object of its own, by which torch.compile knows functions."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def install(module: nn.Module, choice: Choice) -> None:
    """Let calls of `module` take the examples that `choice` says."""
    vars(module)["forward"] = CompactForward(module, choice, vars(module).get("forward"))


def uninstall(module: nn.Module) -> Choice | None:
    """Take that away, and return the choice that was in force."""
    forward = installed(module)
    if forward is None:
        return None
    del vars(module)["forward"]
    if forward.own is not None:
        vars(module)["forward"] = forward.own
    return forward.choice


def installed(module: nn.Module) -> CompactForward | None:
    """What `install` put on a module; None if it did not."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, CompactForward) else None
