"""Whether the compiled loops can be had; they need numba, which fxprop does not."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

# 0: never; always: also where masking is expected to be faster, for tests
_SWITCH = "FXPROP_SPARSE"
# found, not imported, which takes a second
_INSTALLED = importlib.util.find_spec("numba") is not None
INSTALL = "pip install 'fxprop[sparse]'"
# why they are not run where they can be had
UNKNOWN = "the loops over single entries do not know this operator, device or type"


def why_not() -> str | None:
    """Why entries are not computed sparsely on this machine; None if they are.

    FXPROP_SPARSE=0 in the environment switches them off.
    """
    if os.environ.get(_SWITCH) == "0":
        return "FXPROP_SPARSE=0 is set"
    return None if _INSTALLED else f"numba is not installed ({INSTALL})"


def are_forced() -> bool:
    """Whether they are to be run wherever they can be."""
    return os.environ.get(_SWITCH) == "always"


def takes(*tensors: Tensor) -> bool:
    """Whether the loops can be run on these: on the CPU, of float32 or float64."""
    types = {tensor.dtype for tensor in tensors}
    return (
        why_not() is None
        and types in ({torch.float32}, {torch.float64})
        and all(tensor.device.type == "cpu" for tensor in tensors)
    )
