"""One run of a model on a twin: how its modules are called, and the account of what it does."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxprop.errors import InputError, ValuesNeededError
from fxprop.ops.reads import Product
from fxprop.tracing.observe.account import Op
from fxprop.tracing.observe.answers import Answers
from fxprop.tracing.observe.code_at_work import AccountBesideCalls, Calls
from fxprop.tracing.observe.twin import Twin, describe_all, describe_error, has_values
from fxprop.tracing.observe.untouched import draws
from fxprop.tracing.observe.watch import Watch
from fxprop.tracing.reach import Reach


@dataclass(frozen=True)
class CallPattern:
    """How a module was called once."""

    # every argument that was given is a tensor, and every one that the module takes was given
    plain: bool
    # it was given one tensor and nothing else
    one_tensor: bool
    # "query is key" and the like, for attention
    same: frozenset[str]


@dataclass
class Observation:
    """What one run of a model in one mode showed."""

    calls: dict[str, list[CallPattern]] = field(default_factory=dict)
    # (module at work, parameter) of every product with a parameter
    products: dict[tuple[str, str], None] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    # of a run on real tensors, because the model reads values: what it read
    answers: Answers | None = None
    # what it changed in Python's objects, and whose random numbers it drew besides torch's, in words
    changes: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    # whether fake tensors may have led it another way: it asked them for values, for their class, ...
    wanted_values: bool = False
    # how it failed, and the calls of modules that were at work then
    error: Exception | None = None
    failed: list[tuple[str, int]] = field(default_factory=list)

    @property
    def place(self) -> str:
        """ " at layer 'x'" where it failed; empty for the model itself."""
        inner = self.failed[-1][0] if self.failed else ""
        return f" at layer {inner!r}" if inner else ""


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool
) -> Observation:
    """Run the untouched model once in a mode, on fake tensors or, where it reads values, on real ones."""
    observation = run_observed(model, args, kwargs, training, real=False)
    if observation.error is None and not observation.wanted_values:
        return observation
    if not has_values(model, args, kwargs):
        if observation.error is None:
            return observation
        if observation.wanted_values:
            raise values_needed(observation.place, observation.error) from observation.error
        raise ValuesNeededError(
            "the model cannot run on fake tensors, which have shapes but no values: it "
            f"fails{observation.place}: {describe_error(observation.error)}. Pass real example inputs, and "
            "a model with real weights."
        ) from observation.error
    observation = run_observed(model, args, kwargs, training, real=True)
    if observation.error is not None:
        given = describe_all(args, kwargs)
        raise cannot_run(given, observation.place, observation.error) from observation.error
    return observation


def values_needed(place: str, error: Exception) -> ValuesNeededError:
    """The error of a model that reads values (at `place`) where there are none."""
    return ValuesNeededError(
        f"the model reads the values of tensors{place}, and fxprop finds shapes with fake tensors, which "
        f"have none ({describe_error(error)}). Pass real example inputs, and a model with real weights. Or "
        "leave example_inputs out, if torch.fx can trace the model: FLOPs are then not counted."
    )


def cannot_run(given: str, place: str, error: Exception) -> InputError:
    """The error of a model that fails (at `place`) on the inputs `given`."""
    return InputError(
        f"the model cannot run on the example inputs ({given}): it fails{place}: {describe_error(error)}. "
        "Pass inputs of the shape, dtype and device that the model takes."
    )


@torch.inference_mode(False)
def run_observed(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, *, real: bool
) -> Observation:
    """The same on tensors of one kind; an error of the model's is part of what is observed."""
    observation = Observation()
    twin = Twin(model, args, kwargs, real=real)
    doubtful = frozenset() if real else Reach(model).tells_stand_ins()

    def on_call(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observation.calls.setdefault(name, []).append(_pattern(module, args, kwargs))

    def on_product(module: str, parameter: str, product: Product, result: Any, source: str | None) -> None:
        observation.products.setdefault((module, parameter))

    watch, calls = Watch(twin, on_call, on_product), Calls(doubtful)
    account = AccountBesideCalls(watch, twin.labels(), calls)
    try:
        with twin.running(training) as state, draws() as drawn, contextlib.ExitStack() as stack:
            # torch.fx prints where generated code fails
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(watch.watching())
            if real:
                observation.answers = stack.enter_context(Answers())
            stack.enter_context(calls)
            stack.enter_context(account)
            twin.root(*twin.args, **twin.kwargs)
        observation.changes, observation.drawn = list(state.changed), list(drawn)
    except Exception as error:
        observation.error, observation.failed = error, watch.failed or []
    observation.ops, observation.wanted_values = account.ops, account.wanted_values or bool(calls.ran)
    return observation


def _pattern(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallPattern:
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return CallPattern(plain=False, one_tensor=False, same=frozenset())
    named = all(
        p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for p in signature.parameters.values()
    )
    given = bound.arguments
    tensors = all(isinstance(value, torch.Tensor) for value in given.values())
    pairs = (("query", "key"), ("key", "value"))
    same = {f"{a} is {b}" for a, b in pairs if given.get(a) is not None and given.get(a) is given.get(b)}
    plain = named and tensors and len(given) == len(signature.parameters)
    return CallPattern(plain, tensors and len(given) == 1, frozenset(same))
