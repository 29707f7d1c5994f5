"""One pass over memory in place of several: element-wise formulas with their reductions.

A formula is an ordinary function of tensors. Large tensors on the CPU go through inductor, which makes one
loop of it; without a compiler, and for small tensors, the formula runs piece by piece, so that what it
makes on the way stays in the cache. On other devices it runs as it is written.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxprop.ops.compiling import is_compiling

_log = logging.getLogger("fxprop")

Result = TypeVar("Result")
Formula = Callable[..., Result]

# below this many entries a call takes longer than what it saves
_WORTH_COMPILING = 2**18

# entries that stay in a core's cache between two passes over them
_CACHED = 2**17

# seconds from which on a user should know why the first backward was slow
_WORTH_SAYING = 2.0

_broken: list[str] = []
# seconds that compiling took in the backward that runs
_compiled: list[float] = []


def compiles(tensor: Tensor) -> bool:
    """Whether formulas over such a tensor are compiled; never with FXPROP_FUSE=0 in the environment."""
    return (
        tensor.device.type == "cpu"
        and tensor.numel() >= _WORTH_COMPILING
        and not _broken
        and not is_compiling()
        and os.environ.get("FXPROP_FUSE", "1") != "0"
    )


def call_compiled(formula: Formula[Result], *args: Any) -> Result | None:
    """What `formula` gives, by its compiled form; None if that cannot be had on this machine."""
    try:
        run = _compile(formula)
    except RuntimeError as error:  # torch.compile refuses some platforms altogether
        _give_up(error)
        return None
    if not torch.is_grad_enabled():
        # of a view dynamo looks at what it is a view of, and would compile again for another such
        args = tuple(a.data if isinstance(a, Tensor) else a for a in args)
    before, start = _graphs(), time.perf_counter()
    try:
        result: Result = run(*args)
    except _compilers_errors() as error:
        _give_up(error)
        return None
    if _graphs() != before:
        _tell_at_the_end(time.perf_counter() - start)
    return result


def _graphs() -> int:
    """How many graphs torch has compiled in this process."""
    from torch._dynamo.utils import counters  # slow to import, and there since `_compile`

    return int(counters["stats"]["unique_graphs"])


def _tell_at_the_end(seconds: float) -> None:
    """Say once per backward how long compiling took: the first one would be slow without a word."""
    _compiled.append(seconds)
    if len(_compiled) > 1:
        return
    try:
        torch.autograd.Variable._execution_engine.queue_callback(_tell)
    except RuntimeError:  # not in a backward
        _tell()


def _tell() -> None:
    count, seconds = len(_compiled), sum(_compiled)
    _compiled.clear()
    _log.log(
        logging.WARNING if seconds >= _WORTH_SAYING else logging.INFO,
        "fxprop: compiling %d formulas by inductor took %.1f s of this backward, and none of the next: "
        "torch keeps them, also on disk (FXPROP_FUSE=0 in the environment does without)",
        count,
        seconds,
    )


def _compilers_errors() -> tuple[type[Exception], ...]:
    """What tells that compiling failed, and not the run of what was compiled (for want of memory, say)."""
    # not at the top: dynamo takes a second to import, and is there when something was raised
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException, OSError)  # the latter where the cache on disk cannot be written


def _give_up(error: Exception) -> None:
    _broken.append(f"{type(error).__name__}: {error}")
    _log.warning("fxprop: inductor cannot compile on this machine; going on without (%s)", _broken[0])


@functools.cache
def _compile(formula: Formula[Result]) -> Formula[Result]:
    _log.info("fxprop: compiling %s; torch keeps the result in its cache on disk", formula)
    return torch.compile(formula, dynamic=True, fullgraph=True)


def compute_sums(
    formula: Formula[tuple[Tensor, ...]], *args: Tensor | None, like: Tensor
) -> tuple[Tensor, ...]:
    """The sums that `formula` makes over [examples, channels, positions] or [positions, channels].

    Arguments with as many dimensions as `like` are split along the first one; the others, one value per
    channel, go to every piece.
    """
    if compiles(like):
        sums = call_compiled(formula, *args)
        if sums is not None:
            return sums
    return compute_in_pieces(formula, *args, like=like, entries=_CACHED)


def compute_in_pieces(
    formula: Formula[tuple[Tensor, ...]], *args: Tensor | None, like: Tensor, entries: int
) -> tuple[Tensor, ...]:
    """The sums that `formula` makes, as `compute_sums` takes them, from about so many entries at a time."""
    if like.device.type != "cpu" or is_compiling() or like.numel() <= 2 * entries:
        return formula(*args)
    rows = max(1, entries * len(like) // like.numel())
    starts = range(0, len(like), rows)
    pieces = [
        formula(
            *(
                a[start : start + rows] if isinstance(a, Tensor) and a.dim() == like.dim() else a
                for a in args
            )
        )
        for start in starts
    ]
    return tuple(torch.stack(sums).sum(0) for sums in zip(*pieces, strict=True))
