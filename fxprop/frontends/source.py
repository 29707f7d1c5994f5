"""Where in the user's code a node comes from, by the stack trace that was recorded with it."""

from __future__ import annotations

import re

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
# the machinery between the user's line and the node
_MACHINERY = ("/torch/nn/", "/torch/fx/", "/fxprop/frontends/")


def users_stack(trace: str) -> str:
    """`trace` up to the innermost frame that is not torch's or fxprop's own; "" if there is none.

    Whoever shows the trace (`print_readable`) shows its innermost frame.
    """
    frames = list(_FRAME.finditer(trace))
    while frames and any(part in frames[-1]["file"] for part in _MACHINERY):
        trace = trace[: frames.pop().start()]
    return trace.rstrip() if frames else ""


def source_line(trace: str | None) -> str | None:
    """The user's line, "file.py:12"; None where none was recorded."""
    frames = list(_FRAME.finditer(users_stack(trace or "")))
    return f"{frames[-1]['file']}:{frames[-1]['line']}" if frames else None
