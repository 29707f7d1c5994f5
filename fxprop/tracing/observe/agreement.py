"""Whether traced graphs do what the model does: the accounts of two runs, compared part by part."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fxprop.tracing.observe.account import Op
from fxprop.tracing.observe.accounting import Observation
from fxprop.tracing.observe.twin import describe_error

_CAUSE = (
    "its code takes another path with torch.fx's stand-ins than with tensors (isinstance, hasattr, `try`), "
    "or does what a graph cannot hold"
)


def disagreements(
    model: Observation, traced: Observation, pieces: Collection[str], *, train: bool
) -> dict[str, str]:
    """The parts (of `pieces`, by name) whose graph does something else than the model, and what.

    The innermost parts alone, where parts are inside others.
    """
    faults: dict[str, str] = {}
    mode = "train" if train else "eval"
    theirs, ours = _calls(model.ops, pieces), _calls(traced.ops, pieces)
    for call in dict.fromkeys((*theirs, *ours)):
        name = call[0]
        if name not in faults:
            difference = _difference(theirs.get(call, []), ours.get(call, []))
            if difference:
                faults[name] = f"in {mode} mode {difference}: {_CAUSE}"
    if traced.error is not None:
        at = next((name for name, _ in reversed(traced.failed) if name in pieces), "")
        reason, line = describe_error(traced.error), _line_after(model.ops, traced.ops)
        faults = {
            at: f"in {mode} mode {line}: its graph fails where the model does not ({reason}): {_CAUSE}"
        }
    elif not faults and "" in pieces:
        effects = [f"changes {change}" for change in model.changes if change not in traced.changes]
        effects += [f"draws numbers from {name}" for name in model.drawn if name not in traced.drawn]
        if effects:
            faults[""] = f"in {mode} mode its code {effects[0]}, which a graph would not do"
    return {name: why for name, why in faults.items() if not any(_inside(other, name) for other in faults)}


def _line_after(theirs: list[Op], ours: list[Op]) -> str:
    """The model's line where a graph that failed did not follow it any more."""
    at = next((n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a[:3] != b[:3]), len(ours))
    return theirs[min(at, len(theirs) - 1)].line if theirs else "in its code"


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _calls(ops: list[Op], pieces: Collection[str]) -> Mapping[tuple[str, int], list[Op]]:
    """The operators of each call of each piece; numbers of operators count from its first."""
    calls: dict[tuple[str, int], list[Op]] = {}
    first: dict[tuple[str, int], int] = {}
    for number, op in enumerate(ops):
        for call in op.at:
            if call[0] in pieces:
                start = first.setdefault(call, number)
                calls.setdefault(call, []).append(op._replace(operands=_relative(op.operands, start)))
    return calls


def _relative(operand: Any, start: int) -> Any:
    """An operand with numbers of operators counted from `start`; "outside" for those before it."""
    if isinstance(operand, tuple):
        # (label, shape, dtype) of a tensor
        if len(operand) == 3 and isinstance(operand[1], tuple) and type(operand[0]) is int:
            label = operand[0] - start
            return (label if label >= 0 else "outside", *operand[1:])
        return tuple(_relative(item, start) for item in operand)
    return operand


def _difference(theirs: list[Op], ours: list[Op]) -> str:
    """The first difference, in words; empty where there is none."""
    for model, graph in zip(theirs, ours, strict=False):
        if model[:5] != graph[:5]:  # all but the calls at work and the line
            ours_is, theirs_is = _describe_op(graph), _describe_op(model)
            return f"{model.line}: the model calls {theirs_is} where its graph calls {ours_is}"
    if len(theirs) > len(ours):
        model = theirs[len(ours)]
        return f"{model.line}: the model calls {_describe_op(model)}, and its graph does not"
    if len(ours) > len(theirs):
        return f"its graph calls {_describe_op(ours[len(theirs)])}, and the model does not"
    return ""


def _describe_op(op: Op) -> str:
    shapes = ", ".join(str(list(shape)) for shape, _ in op.results)
    modes = "" if op.modes[0] else " without gradients"
    return f"{op.name} -> {shapes}{modes}"
