"""The activations that a region may end in, with their backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}

_aten = torch.ops.aten
# (gradient of the activation's output, its input; ReLU's output does as well) -> gradient of its input
BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, input: _aten.threshold_backward(grad, input, 0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": functools.partial(_aten.gelu_backward, approximate="tanh"),
    "silu": _aten.silu_backward,
}
