"""Fake twins of a model's tensors and of its example inputs: shapes, dtypes and devices without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

# not a public path, but the one torch's own documentation imports it from;
# tests/test_project.py notices if it moves
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxprop.errors import InputError


def model_device(module: nn.Module) -> torch.device | None:
    """The device of the module's first parameter or buffer; None if it has neither."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return None


class Fakes:
    """Fake twins of the model's tensors and of the example inputs, on one device."""

    def __init__(self, mode: FakeTensorMode, device: torch.device | None) -> None:
        self._mode = mode
        # meta is where a model is when nobody cares for the device; cpu lets tensors that its code
        # makes on the way mix with it, as they will when it is real
        self._device = torch.device("cpu") if device is None or device.type == "meta" else device
        self._follow_model = device is not None and device.type == "meta"
        # what autograd is asked the gradients of
        self.leaves: list[torch.Tensor] = []

    def of_model(self, tensor: torch.Tensor) -> torch.Tensor:
        registered = isinstance(tensor, nn.Parameter)
        fake = self._make(tensor, self._device if tensor.is_meta else tensor.device)
        if registered:
            fake = nn.Parameter(fake, requires_grad=False)
        return self._as_leaf(fake, tensor)

    def of_input(self, value: Any) -> Any:
        def convert(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            follow = leaf.is_meta or self._follow_model
            return self._as_leaf(self._make(leaf, self._device if follow else leaf.device), leaf)

        return pytree.tree_map(convert, value)

    def _make(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        with self._mode:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

    def _as_leaf(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        if real.requires_grad:
            fake.requires_grad_(True)
            self.leaves.append(fake)
        return fake


def bind_placeholders(
    placeholders: list[fx.Node], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """One value per placeholder, as a call of the generated forward would bind them."""
    values: list[Any] = []
    positional, keywords = list(args), dict(kwargs)
    for node in placeholders:
        name = str(node.target)
        if name.startswith("**"):
            values.append(keywords)
            keywords = {}
        elif name.startswith("*"):
            values.append(tuple(positional))
            positional = []
        elif positional:
            values.append(positional.pop(0))
        elif name in keywords:
            values.append(keywords.pop(name))
        elif node.args:
            values.append(node.args[0])
        else:
            raise InputError(
                f"the example inputs lack {name!r}: the model takes "
                f"{', '.join(str(p.target) for p in placeholders)}"
            )
    if positional or keywords:
        extra = [describe(v) for v in positional] + list(keywords)
        raise InputError(
            f"the example inputs have {len(extra)} too many ({', '.join(extra)}): the model takes "
            f"{', '.join(str(p.target) for p in placeholders)}"
        )
    return values


def without_data_dependence(module: nn.Module) -> None:
    """Settle what would make a module read the value of a tensor."""
    # momentum=None makes batch norm read a counter's value, which a fake tensor does not have
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.momentum is None:
            norm.momentum = 0.1


def describe(value: Any) -> str:
    """A value as error messages show it: "float32[8, 3, 224, 224]" for a tensor."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)
