"""Whether an operator runs, or is traced to be compiled."""

from __future__ import annotations

import torch
from torch._guards import TracingContext


def is_compiling() -> bool:
    """Whether torch.compile is at work: dynamo, or AOTAutograd on the graph that a backend gave it.

    Public `torch.compiler.is_compiling()` does not know the latter before torch 2.12; tests/test_backend.py
    would notice if the context moved.
    """
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None
