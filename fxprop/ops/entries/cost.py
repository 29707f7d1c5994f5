"""Whether kept entries are better computed one by one, or with the rest at zero by the dense kernels.

Times are in nanoseconds; only their ratios matter. They are those of examples/benchmarks/element_layers.py
on a CPU with AVX2, with something added for one whose dense products are twice as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# one multiply-add of a large dense product, and of one with an entry
_DENSE, _ENTRY = 0.0145, 0.06
# for each entry that is kept and for each product: to put it in order, and to begin its row
_BEGIN = 8.0
# for each run of numbers in its row
_PIECE = 2.0
# to read an entry of grad_output for the selection, and to move a number of the input or its gradient
_SELECT, _MOVE = 0.8, 1.0
# once a call, for each number of the weight and each product: where it lies well, and where it has several
# taps, which are rearranged
_WEIGHT, _TAPS = 0.3, 1.0
# to find and mask the largest entries, by torch
_TOPK = 12.0
# what a call costs, whatever there is to do
_CALL = 1e6


class Example(NamedTuple):
    """One example of a convolution, or one row of a product."""

    # entries of grad_output
    entries: int
    # numbers of the input
    input: int
    # numbers that an entry meets, a row of the weight, and in how many runs they lie
    row: int
    pieces: int
    # numbers of the weight
    weight: int
    # of the dense kernels, for each gradient
    multiply_adds: float

    @classmethod
    def of(
        cls, entries: int, input: int, weight: Sequence[int], joined: bool, transposed: bool = False
    ) -> Example:
        """Of a weight [C_out, C_in/groups, *kernel]; a transposed one's is [C_in, C_out/groups, *kernel].

        joined: whether neighbouring taps meet neighbouring numbers.
        """
        taps = math.prod(weight[2:])
        # of a transposed convolution's only as many as there are without groups
        row = taps * (weight[0] if transposed else weight[1])
        pieces = taps // weight[-1] if joined and taps > 1 else taps
        met = input * math.prod(weight[1:]) if transposed else entries * row
        return cls(entries, input, row, pieces, math.prod(weight), met)

    def wins(self, kept: float, products: int, examples: int | None) -> bool:
        """Whether so many entries are computed faster alone than by that many products with the mask.

        Where `examples` are not known, they are many.
        """
        return self._alone(kept, products, examples) < self._masked(products)

    def pays(self, left: float, products: int, examples: int) -> bool:
        """Whether so many entries are computed faster alone than by that many dense products."""
        return self._alone(left, products, examples) < products * self.multiply_adds * _DENSE

    def speedup(self, kept: float, products: int, examples: int | None) -> float:
        """Time of the dense backward over that of the better of the two."""
        best = min(self._alone(kept, products, examples), self._masked(products))
        return products * self.multiply_adds * _DENSE / best

    def _masked(self, products: int) -> float:
        return self.entries * _TOPK + products * self.multiply_adds * _DENSE

    def _alone(self, kept: float, products: int, examples: int | None) -> float:
        of_entry = self.row * _ENTRY + self.pieces * _PIECE + _BEGIN
        # a linear layer's input is met where it lies
        is_linear = self.input == self.row
        moved = 0.0 if is_linear else products * self.input * _MOVE
        call = _CALL + products * self.weight * (_WEIGHT if is_linear else _TAPS)
        once = 0.0 if examples is None else call / max(1, examples)
        return self.entries * _SELECT + products * kept * of_entry + moved + once
