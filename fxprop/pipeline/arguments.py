"""Checks of the arguments, before anything is done with them, and of the plan made from them.

Each check raises an error that says what was given, what was expected and what to do; none changes
anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxprop.compact.install import installed
from fxprop.errors import InputError, ModelError, PolicyError, TraceError
from fxprop.graph.rewrite import is_rewritten
from fxprop.plan.decisions import Plan
from fxprop.pytree import tree_leaves

ExampleInputs = tuple[Any, ...] | torch.Tensor | None


def check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {name}: expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{name} is a TorchScript module: pass the nn.Module it was made from")
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            f"{name} comes from torch.compile: transform the module first, then compile the result"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelError(f"{name} wraps a model: transform model.module first, then wrap the result")
    lazy = [key for key, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ModelError(
            f"{name} has lazy parameters without a shape ({', '.join(lazy[:3])}): "
            "run the model once on real inputs first"
        )
    # 0-d tensors mix with any device
    tensors = (*model.parameters(), *(b for b in model.buffers() if b.dim() > 0))
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise ModelError(
            f"{name} has parameters or buffers on several devices ({', '.join(devices)}): "
            "move it to one with model.to(device)"
        )


FRONTENDS = ("auto", "symbolic", "submodules", "export")


def check_frontend(frontend: str) -> None:
    if frontend not in FRONTENDS:
        raise TraceError(f"unknown front-end {frontend!r}: expected one of {', '.join(FRONTENDS)}")


def check_inputs(
    example_inputs: ExampleInputs, example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise InputError(
            f"example_inputs is a {type(example_inputs).__name__}: expected a tuple of the model's "
            "positional inputs, such as (torch.empty(8, 3, 224, 224),), or one tensor"
        )
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise InputError(
            f"example_kwargs is a {type(example_kwargs).__name__}: expected a dict of keyword inputs"
        )
    args, kwargs = example_inputs or (), dict(example_kwargs or {})
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, torch.Tensor) and value.is_nested:
            raise InputError(
                f"the example inputs hold a nested tensor of {value.size(0)} parts, which have no shape in "
                "common: pass a padded tensor in its place, such as torch.nested.to_padded_tensor(x, 0.0). "
                "The transformed module takes nested tensors"
            )
    return args, kwargs


def count_examples(inputs: Any) -> int | None:
    """How many examples the inputs have: the first dimension of the first tensor that has one."""
    shapes = (leaf.shape for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    return next((shape[0] for shape in shapes if len(shape) > 0), None)


def check_not_rewritten(model: nn.Module) -> None:
    if any(is_rewritten(module) or installed(module) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} was already transformed by fxprop: call fxprop.restore on it first, "
            "then transform the result"
        )


def check_needs_no_shapes(plans: Mapping[bool, Plan]) -> None:
    for plan in plans.values():
        for decision in plan.decisions:
            if decision.status == "skipped" and decision.site.skip is None:
                raise PolicyError(f"layer {decision.site.name!r}: {decision.reason}; pass example_inputs")
