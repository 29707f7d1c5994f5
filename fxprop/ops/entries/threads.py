"""Compiled loops on as many threads as torch uses, without a threading layer of numba's.

>>> run([functools.partial(loop, part) for part in parts])

The loops release the interpreter's lock, so plain Python threads do. Numba's own layers either stop the
process when two threads come at once (workqueue: torch's autograd may call from any) or when it was forked
(OpenMP). What a task computes does not depend on which thread takes it, so results are the same to the bit
for any number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

Task = Callable[[], object]

_pools: dict[int, ThreadPoolExecutor] = {}
# a child has the pools' records, but not their threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def run(tasks: Sequence[Task]) -> None:
    """Every task once, in any order; raises what the first to fail raises."""
    helpers = min(torch.get_num_threads(), len(tasks)) - 1
    # popleft() is atomic
    left = deque(tasks)
    if helpers < 1:
        _work(left)
        return
    pool = _pools.get(helpers)
    if pool is None:
        pool = _pools.setdefault(helpers, ThreadPoolExecutor(helpers, "fxprop"))
    others = [pool.submit(_work, left) for _ in range(helpers)]
    try:
        _work(left)
    finally:
        wait(others)
    for other in others:
        other.result()


def _work(left: deque[Task]) -> None:
    while True:
        try:
            task = left.popleft()
        except IndexError:
            return
        task()


def tasks() -> int:
    """Into how many to divide what comes, so that a thread that is held up does less."""
    return 4 * torch.get_num_threads()


def ranges(n: int, parts: int) -> list[tuple[int, int]]:
    """0 to n in about so many equal ranges, none empty.

    >>> ranges(10, 3)
    [(0, 4), (4, 8), (8, 10)]
    """
    size = max(1, -(-n // parts))
    return [(begin, min(n, begin + size)) for begin in range(0, n, size)]
