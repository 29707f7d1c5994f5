"""Where in the user's code a node comes from, by the stack trace that was recorded with it."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
# the machinery between the user's line and the node
_MACHINERY = (f"{Path(torch.__file__).parent.as_posix()}/", "/torch/nn/", "/torch/fx/", "/fxprop/tracing/")

# where runs of a model begin
_RUN = [str(Path(__file__).with_name("observe") / name) for name in ("accounting.py", "run.py")]
# code between a user's line and an operator that runs
_BELOW = (*(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, Path(__file__).parent)), "<")


def users_stack(trace: str) -> str:
    """`trace` up to the innermost frame that is not torch's or fxprop's own; "" if there is none.

    Whoever shows the trace (`print_readable`) shows its innermost frame.
    """
    frames = list(_FRAME.finditer(trace))
    while frames and _is_machinery(frames[-1]["file"]):
        trace = trace[: frames.pop().start()]
    return trace.rstrip() if frames else ""


def is_users_code_at_work(began: types.CodeType) -> bool:
    """Whether `users_stack` would find a frame between the caller and the trace that `began` there."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not began:
        if not _is_machinery(frame.f_code.co_filename):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@functools.cache
def _is_machinery(file: str) -> bool:
    return any(part in file.replace("\\", "/") for part in _MACHINERY)


def source_line(trace: str | None) -> str | None:
    """The user's line, "file.py:12"; None where none was recorded."""
    frames = list(_FRAME.finditer(users_stack(trace or "")))
    return f"{frames[-1]['file']}:{frames[-1]['line']}" if frames else None


def users_line(most: int = 3) -> str:
    """The innermost lines at work that are neither torch's nor ours: "layers.py:12 (from net.py:40)"."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < most:
        file = frame.f_code.co_filename
        if file in _RUN:
            break
        if not file.startswith(_BELOW):
            lines.append(f"{file}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    innermost, *callers = lines or [""]
    return innermost + (f" (from {', '.join(callers)})" if callers else "")


def first_line(function: Any) -> str:
    """Where a function is defined, "file.py:12"; empty if that is not known."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""
