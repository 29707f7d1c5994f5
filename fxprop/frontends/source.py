"""Where in the user's code a node comes from, by the stack trace that was recorded with it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
# the machinery between the user's line and the node
_MACHINERY = ("/torch/nn/", "/torch/fx/", "/fxprop/frontends/")

# code between a user's line and an operator that runs
_BELOW = (*(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, Path(__file__).parent)), "<")


def users_stack(trace: str) -> str:
    """`trace` up to the innermost frame that is not torch's or fxprop's own; "" if there is none.

    Whoever shows the trace (`print_readable`) shows its innermost frame.
    """
    frames = list(_FRAME.finditer(trace))
    while frames and any(part in frames[-1]["file"].replace("\\", "/") for part in _MACHINERY):
        trace = trace[: frames.pop().start()]
    return trace.rstrip() if frames else ""


def source_line(trace: str | None) -> str | None:
    """The user's line, "file.py:12"; None where none was recorded."""
    frames = list(_FRAME.finditer(users_stack(trace or "")))
    return f"{frames[-1]['file']}:{frames[-1]['line']}" if frames else None


def users_line() -> str:
    """The innermost line at work that is neither torch's nor ours: "file.py:12"."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_BELOW):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
