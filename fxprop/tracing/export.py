"""The export front-end: a model to a graph of aten operators, by torch.export.

The graph takes the parameters from a copy of the model's own tree, under their own names.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn

from fxprop.errors import TraceError
from fxprop.pytree import tree_map
from fxprop.tracing.module.copy_tree import copy_tree
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.observe.twin import describe_error
from fxprop.tracing.traced import Inputs, Traced


def trace_exported(model: nn.Module, inputs: Inputs | None) -> Traced:
    """The model's aten graph in its present mode and, where it differs, in the other one.

    >>> traced = trace_exported(transformers.BertModel(config), ((), {"input_ids": ids}))

    Sizes of the inputs stay free as far as the model's code allows. Raises TraceError where
    torch.export cannot capture the model.
    """
    if inputs is None:
        raise TraceError("the export front-end needs example_inputs: torch.export runs the model on them")
    tree = copy_tree(model)
    here = model.training
    graphs: dict[bool, fx.Graph] = {here: _export(model, tree, here, inputs)}
    why = ""
    try:
        there = _export(model, tree, not here, inputs)
        same = there.python_code("self").src == graphs[here].python_code("self").src
        graphs[not here] = graphs[here] if same else there
    except TraceError as error:
        why = str(error)
    root = TracedModule(tree, graphs, type(model).__name__, untraced=why)
    return Traced(root, "export", {"": root})


def _export(model: nn.Module, tree: nn.Module, training: bool, inputs: Inputs) -> fx.Graph:
    """The graph in one mode; what it needs besides the model's own tensors is added to `tree`."""
    twin = copy_tree(model)
    for module in twin.modules():
        module.training = module.training if training == model.training else training
    args, kwargs = inputs

    def free(value: Any) -> Any:
        tensor = isinstance(value, torch.Tensor)
        return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if tensor else None

    try:
        # strict=False: the same tracing as torch.compile's, without its guards on Python objects
        by_name = inspect.signature(twin.forward).bind(*args, **kwargs).arguments
        program = torch.export.export(
            twin, args, dict(kwargs), dynamic_shapes=tree_map(free, by_name), strict=False
        )
    except Exception as error:
        raise TraceError(
            f"torch.export cannot capture {type(model).__name__}: {describe_error(error)}. Use "
            "frontend='auto', which traces what it can."
        ) from error
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    suffix = "_train" if training else "_eval"
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            _adopt(tree, module, node, suffix)
    return module.graph


def _adopt(tree: nn.Module, module: nn.Module, node: fx.Node, suffix: str) -> None:
    """Make sure that `tree` has what `node` names: constants and guards are the exported module's own."""
    target = str(node.target)
    path, _, name = target.rpartition(".")
    owner = tree.get_submodule(path) if path else tree
    if hasattr(owner, name):
        return
    value = getattr(module.get_submodule(path), name)
    # the guards are of one mode; and not a buffer, so that the state_dict stays as it was
    if isinstance(value, nn.Module):
        owner.add_module(name + suffix, value)
        node.target = ".".join(filter(None, (path, name + suffix)))
    else:
        owner.__dict__[name] = value
