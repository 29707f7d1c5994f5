"""A module whose calls go through the cut backward: `forward` on the instance, in place of its class's."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fxprop.compact.captured import fresh
from fxprop.compact.choice import Choice
from fxprop.compact.compile import Compact
from fxprop.compact.examine import call_compiled
from fxprop.errors import ExamplesError
from fxprop.pytree import tree_leaves

# more kinds of calls than a program has, of which each is captured once
_REMEMBERED = 256


class CompactForward:
    """What a call of a module does while its backward takes part of the mini-batch.

    Lies in the module's `__dict__` as `forward`, so copies and pickles of the module have it too.
    """

    def __init__(self, module: nn.Module, choice: Choice, own: Callable[..., Any] | None) -> None:
        self.choice = choice
        # a forward that was on the instance before
        self.own = own
        # what says which rewrite of the module is in force
        self.version: Hashable = None
        self._module = module
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._refuse = _refusal()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or (torch.compiler.is_compiling() and self.choice.is_full()):
            return self._plain(*args, **kwargs)
        if torch.compiler.is_compiling():
            self._refuse()
        if not self._needs_backward(args, kwargs):
            return self._plain(*args, **kwargs)
        if self.choice.is_full() or (not _may_be_repeated() and self.choice.rests()):
            self.choice.last = None
            return self._plain(*args, **kwargs)
        _check_modes()
        plain = self.own or types.MethodType(type(self._module).forward, self._module)
        return call_compiled(self._of(plain, args, kwargs), plain, args, kwargs)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)

    @property
    def __code__(self) -> types.CodeType:
        # dynamo asks a GraphModule's forward for it, wherever it lies
        code: types.CodeType = getattr(self.own or type(self._module).forward, "__code__")  # noqa: B009
        return code

    def _needs_backward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if torch.is_inference_mode_enabled():
            return False
        return any(t.requires_grad for t in (*self._module.parameters(), *_tensors((args, kwargs))))

    def _of(
        self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[..., Any]:
        """A compiled function for each kind of call: torch.compile bounds the versions of one function.

        torch 2.11 does not notice by itself that a parameter requires gradients now.
        """
        key = (
            getattr(plain, "__func__", plain),
            self.version,
            self._module.training,
            tuple(p.requires_grad for p in self._module.parameters()),
            tuple((t.dim(), t.dtype, t.requires_grad) for t in _tensors((args, kwargs))),
        )
        if key not in self._compiled:
            if len(self._compiled) >= _REMEMBERED:
                self._compiled.pop(next(iter(self._compiled)))
            compact = Compact(self.choice)
            self._compiled[key] = torch.compile(fresh(_call), backend=compact, fullgraph=True)
        return self._compiled[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": {}, "_refuse": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _refuse=_refusal())


def _tensors(given: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def _call(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return plain(*args, **kwargs)


def _may_be_repeated() -> bool:
    """Whether a checkpoint may call again, and expect that the same is saved."""
    # private: whether hooks for saved tensors are in force, by which torch.utils.checkpoint notices;
    # tests/test_examples_training.py would notice
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


_COMPILED = (
    "torch.compile of a module that fxprop.transform gave a share of examples would run its backward on "
    "all of them. Compile the model itself with torch.compile(model, backend=fxprop.backend(policy))"
)


def _refusal() -> Callable[[], None]:
    """A function that raises, and that dynamo does not look into: it would take the raise for a break."""

    def refuse() -> None:
        raise ExamplesError(_COMPILED)

    return cast(Callable[[], None], torch.compiler.disable(refuse, reason=_COMPILED))  # type: ignore[no-untyped-call]


def _check_modes() -> None:
    # private: torch.compile passes over what is called under such a mode, and has no public way to tell;
    # tests/test_examples_refusals.py would notice
    mode = _get_current_dispatch_mode()
    if mode is not None:
        raise ExamplesError(
            f"the module was called under {type(mode).__name__}, where torch.compile captures nothing, so "
            "that its backward would run on all examples. Call it outside; the backward may be inside"
        )


def install(module: nn.Module, choice: Choice) -> CompactForward:
    """Let calls of `module` take the examples that `choice` says."""
    forward = CompactForward(module, choice, vars(module).get("forward"))
    vars(module)["forward"] = forward
    return forward


def uninstall(module: nn.Module) -> CompactForward | None:
    """Take that away, and return what was there."""
    forward = installed(module)
    if forward is None:
        return None
    del vars(module)["forward"]
    if forward.own is not None:
        vars(module)["forward"] = forward.own
    return forward


def reinstall(module: nn.Module, forward: CompactForward) -> None:
    """Put back what `uninstall` took."""
    vars(module)["forward"] = forward


def installed(module: nn.Module) -> CompactForward | None:
    """What `install` put on a module; None if it did not."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, CompactForward) else None
