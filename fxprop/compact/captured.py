"""What fxprop asks of a graph that torch.compile captured: its inputs, and the symbol of the batch size."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from fxprop.compact.cut import CannotCut

if TYPE_CHECKING:
    import sympy


_CALLS = itertools.count()


def fresh(function: Any) -> types.FunctionType:
    """The same function with a code object and a name of its own.

    torch.compile knows functions by the one, and by the other which of their sizes have varied so far.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_CALLS)}")
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


def needs_backward(example_inputs: Sequence[Any]) -> bool:
    """Whether autograd records a graph on these inputs."""
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in example_inputs
    )


def parameter_names(example_inputs: Sequence[Any]) -> frozenset[str]:
    """What AOTAutograd calls the inputs that are parameters."""
    return frozenset(f"primals_{i}" for i, t in enumerate(example_inputs, 1) if isinstance(t, nn.Parameter))


def has_several(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether there is more than one example to choose from."""
    inputs = inputs_of(gm, example_inputs)
    return not inputs or bool(inputs[0][1].shape[0] > 1)


def inputs_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[tuple[fx.Node, Tensor]]:
    """The tensors that come from outside of the model, and have a first dimension."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    pairs = zip(placeholders, example_inputs, strict=True)
    return [(n, t) for n, t in pairs if isinstance(t, Tensor) and t.dim() > 0 and not _is_state(n, t)]


def batch_symbol(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> sympy.Symbol:
    """The symbol of the number of examples, which is the first dimension of the model's inputs.

    Where torch.compile took that number for fixed, it is asked to trace again with a symbol.
    """
    inputs = inputs_of(gm, example_inputs)
    if not inputs:
        raise CannotCut("none of its inputs is a tensor with a first dimension")
    count = inputs[0][1].shape[0]
    batch = [(n, t) for n, t in inputs if t.shape[0] == count]
    counts = [s for n, _ in batch if isinstance(s := _shape_of(n)[0], torch.SymInt)]
    marked = [t for _, t in batch if hasattr(t, _MARK)]
    if len(counts) < len(batch) and not marked:
        for _, tensor in batch:
            before = {key: copy.copy(value) for key, value in vars(tensor).items()}
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            setattr(tensor, _MARK, before)
        # private: the one request of a backend to be given the graph again that dynamo grants; there is no
        # public way to ask for a symbol from inside a backend. tests/test_examples_training.py would notice
        raise torch._dynamo.exc.TensorifyScalarRestartAnalysis("fxprop needs a symbol for the batch size")
    for tensor in marked:
        before = getattr(tensor, _MARK)
        vars(tensor).clear()
        vars(tensor).update(before)
    same = len(counts) == len(batch) and all(size == counts[0] for size in counts)  # each becomes a guard
    if not same or not counts[0].node.expr.is_Symbol:
        line = next(filter(None, map(_fixing_line, counts)), None)
        raise CannotCut(
            f"its code fixes the number of examples at {int(count)}{f': {line}' if line else ''}"
        )
    return cast("sympy.Symbol", counts[0].node.expr)


def _fixing_line(size: torch.SymInt) -> str | None:
    """The line that made a guard of this size's symbol."""
    import sympy

    # private, and for the message alone
    for guard in getattr(size.node.shape_env, "guards", ()):
        where = getattr(guard.sloc, "maybe_user_loc", None)
        if isinstance(guard.expr, sympy.Eq) and where:
            return str(where).partition("  # ")[0].partition(";  ")[0]
    return None


# on inputs between the two traces: what their attributes were
_MARK = "_fxprop_before"


def _shape_of(node: fx.Node) -> Sequence[Any]:
    shape: Sequence[Any] = node.meta["example_value"].shape
    return shape


def _is_state(node: fx.Node, tensor: Tensor) -> bool:
    if isinstance(tensor, nn.Parameter):
        return True
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    text = name() if callable(name) else str(name)
    return "_buffers[" in text or "_parameters[" in text or "_modules[" in text
