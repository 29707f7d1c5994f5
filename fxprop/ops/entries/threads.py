"""Compiled loops on the threads that torch's own operators run on.

>>> run([functools.partial(loop, part) for part in parts])

The loops release the interpreter's lock, so any threads do. Torch's are taken because they stay on their
cores for milliseconds after one of its operators, waiting for the next at full speed: threads of fxprop's
own would get half of such a core. Numba's own layers either stop the process when two threads come at once
(workqueue: torch's autograd may call from any) or when it was forked (OpenMP). What a task computes does
not depend on which thread takes it, so results are the same to the bit for any number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

Task = Callable[[], object]

# of a task, at least: a number that is read, or multiplied by a kept entry's
_STEPS = 2**18

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pools: dict[int, ThreadPoolExecutor] = {}
# a child has the records of its parent's threads, but not the threads
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(tasks: Sequence[Task]) -> None:
    """Every task once, in any order; raises what the first to fail raises."""
    threads = min(torch.get_num_threads(), len(tasks))
    # popleft() and append() are atomic
    left, failed = deque(tasks), deque[BaseException]()

    def work(_: object = None) -> None:
        try:
            while True:
                try:
                    task = left.popleft()
                except IndexError:
                    return
                task()
        except BaseException as error:
            failed.append(error)

    in_parallel = None if threads == 1 or _forked else openmp()
    if threads == 1:
        work()
    elif in_parallel:
        in_parallel(_BODY(work), None, threads, 0)
    else:
        _on_own_threads(work, threads - 1)
    if failed:
        raise failed[0]


@functools.cache
def openmp() -> Any:
    """What begins a parallel region of torch's OpenMP, called (body, its argument, threads, flags).

    GNU's name for it, which compilers put into programs and LLVM's and Intel's runtimes have too. None
    where torch has none of these.
    """
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    try:
        # a library finds what those have that it was linked with: the runtime that torch itself calls
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found


def _on_own_threads(work: Task, helpers: int) -> None:
    pool = _pools.get(helpers)
    if pool is None:
        pool = _pools.setdefault(helpers, ThreadPoolExecutor(helpers, "fxprop"))
    others = [pool.submit(work) for _ in range(helpers)]
    work()
    for other in others:
        other.result()


def tasks(steps: int) -> int:
    """Into how many to divide so many steps of a loop, so that a thread that is held up does less.

    Beginning a task costs as much as some thousand steps.
    """
    threads = torch.get_num_threads()
    return max(threads, min(4 * threads, steps // _STEPS))


def ranges(n: int, parts: int) -> list[tuple[int, int]]:
    """0 to n in about so many equal ranges, none empty.

    >>> ranges(10, 3)
    [(0, 4), (4, 8), (8, 10)]
    """
    size = max(1, -(-n // parts))
    return [(begin, min(n, begin + size)) for begin in range(0, n, size)]
