"""The dynamo front-end: a graph that torch.compile captured, with its parameters found among its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxprop.tracing.module.copy_tree import copy_tree
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.traced import Traced

# L['self'].blocks[0] is blocks.0, and getattr(L['self'].blocks, '0') is
_ROOT = re.compile(r"^\w\['\w+'\]")
_INDEX = re.compile(r"\[['\"]?(\w+)['\"]?\]")
_GETATTR = re.compile(r"getattr\(([^()]*), ['\"](\w+)['\"]\)")
_STEP = re.compile(r"\._(?:modules|parameters)\['([^']+)'\]")


def trace_captured(
    captured: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str] | None = None
) -> Traced:
    """`captured` as a traced model whose parameters are placeholders.

    >>> traced = trace_captured(gm, example_inputs)      # in a torch.compile backend
    >>> traced.parameters
    {'l_self_modules_fc_parameters_weight_': 'fc.weight', ...}

    `names` gives the parameters' names by id; otherwise they are the path by which the captured code
    reached them, which starts at the module whose code it is.
    """
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    parameters = {}
    for node, value in zip(placeholders, inputs, strict=True):
        name = (names or {}).get(id(value)) or _name_in_source(node)
        if isinstance(value, nn.Parameter) and name is not None:
            parameters[node.name] = name
    graph = captured.graph
    root = TracedModule(copy_tree(captured), {True: graph, False: graph}, "Captured")
    return Traced(root, "dynamo", {"": root}, parameters=parameters)


def _name_in_source(node: fx.Node) -> str | None:
    # where dynamo found the value: L['self']._modules['fc']._parameters['weight']; not a public
    # attribute, and tests/test_backend.py fails if it moves
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    text = name() if callable(name) else str(name)
    return ".".join(_STEP.findall(text)) or None


def module_in_stack(node: fx.Node) -> tuple[str, type[nn.Module]] | None:
    """The path and class of the innermost module whose forward `node` is from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or not isinstance(stack[-1][1], type):
        return None
    return _path(stack[-1][0]), stack[-1][1]


def module_in(stack: Mapping[str, Any] | None) -> str:
    """The path of the innermost module in a stack that dynamo recorded; "" where there is none."""
    return _path(list(stack.values())[-1][0]) if stack else ""


def _path(expression: object) -> str:
    text, count = str(expression), 1
    while count:
        text, count = _GETATTR.subn(r"\1.\2", text)
    path = _INDEX.sub(r".\1", _ROOT.sub("", text)).removeprefix(".")
    return path.replace("_modules.", "")
