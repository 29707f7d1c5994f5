"""The decorator of the compiled loops. Imported only where numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

# of fast math only fused multiply-adds are allowed, for NaN and inf to survive
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}


def compiled(loop: Callable[..., Any]) -> Any:
    """`loop` compiled at its first call for a type; kept on disk where a place can be written to.

    It releases the interpreter's lock.
    """
    try:
        return njit(cache=True, **_OPTIONS)(loop)
    except RuntimeError:  # numba found no such place
        return njit(**_OPTIONS)(loop)
