"""How many examples of a mini-batch a share of them is."""

from __future__ import annotations


def take_share(share: float, n: int) -> int:
    """k of n examples: the nearest count, 2 at least, as graphs are made for more than one.

    >>> take_share(0.25, 32), take_share(0.01, 32)
    (8, 2)
    """
    return min(n, max(2, int(share * n + 0.5)))
