"""Which examples of a mini-batch enter the backward, and how many.

Sources: importance sampling by gradient norms, 1803.00942, section 3; systematic sampling, Madow 1949.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fxprop.plan.batch import take_share
from fxprop.settings import ExamplesSelect

# of the smoothed spread, how much stays from one step to the next
_SMOOTHING = 0.9
# "auto" decides for eighths of the mini-batch
_STEPS = 8
# while it keeps all it looks at one call in so many: the others cost what they cost without it
_LOOKS = 8
# examples without any gradient are drawn this much more rarely than the one with the largest
_LEAST_SCORE = 1e-6


class Kept(NamedTuple):
    """How many examples entered a backward, and of how many."""

    k: int
    n: int

    @property
    def share(self) -> float:
        """k / n."""
        return self.k / self.n


class Chosen(NamedTuple):
    """Indices of examples, ascending, and what their gradients are multiplied by (None: nothing)."""

    examples: Tensor
    weights: Tensor | None


@dataclass
class Choice:
    """What decides which examples enter the backward; one for a model, shared by all its graphs.

    `share` may be changed at any time; "auto" follows the spread of the examples' gradient norms: with CV
    their deviation over their mean, the share is factor / (1 + CV^2), between `least` and 1. The spread is
    read one step late, so that nothing waits for the device. While it keeps all, most calls of the module
    `rest`: they need no cut.
    """

    share: float | Literal["auto"]
    select: ExamplesSelect = "importance"
    least: float = 0.15
    factor: float = 1.0
    # of the last backward; None before the first
    last: Kept | None = None
    # smoothed CV^2; None before the first backward
    spread: float | None = None
    # backwards that went through a cut so far
    served: int = 0
    # calls of the module that needed no cut since the last that had one
    rested: int = 0
    # the call of backward() that was decided for last, and of how many examples
    _decided: tuple[int, int] = field(default=(-1, 0), repr=False)
    _arriving: Tensor | None = field(default=None, repr=False)
    _event: Any = field(default=None, repr=False)
    # for how many calls the spread that arrives stands
    _stands_for: int = field(default=1, repr=False)

    def state_dict(self) -> dict[str, Any]:
        """What "auto" has learnt."""
        self._read_spread(wait=True)
        return {"spread": self.spread, "rested": self.rested}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.spread, self._arriving = state["spread"], None
        self.rested = state.get("rested", 0)

    def __getstate__(self) -> dict[str, Any]:
        self._read_spread(wait=True)
        return {**vars(self), "_event": None}

    def is_full(self) -> bool:
        """Whether all examples enter, whatever the mini-batch."""
        return self.share == 1

    def rests(self) -> bool:
        """Whether a call that comes now takes all examples, and nothing is to be learnt from it."""
        if self.share != "auto":
            return self.is_full()
        if self._by_spread() < 1 or self.spread is None or self.rested == _LOOKS - 1:
            return False
        self.rested += 1
        return True

    def count(self, n: int) -> int:
        """How many of n examples the next backward takes; 2 at least: graphs are made for several."""
        return take_share(self._by_spread() if self.share == "auto" else self.share, n)

    def _by_spread(self) -> float:
        """The share that "auto" takes."""
        self._read_spread(wait=False)
        if self.spread is None:
            return 1.0
        share = min(1.0, self.factor / (1 + self.spread))
        return max(self.least, round(share * _STEPS) / _STEPS)

    def decide(self, n: int) -> tuple[int, bool]:
        """How many of n examples a graph's backward takes, and whether it is the first in `backward()`.

        Graphs further on take as many: what arrives there is of the examples that the first one chose.
        """
        # private, as torch.utils.checkpoint uses it: which call of backward() is at work
        task = torch._C._current_graph_task_id()
        is_first = (task, n) != self._decided
        if is_first or self.last is None:
            self._decided, self.last = (task, n), Kept(self.count(n), n)
        return self.last.k, is_first

    def choose(self, norms: Tensor, k: int) -> Chosen:
        """k of the examples that have these gradient norms, [n]."""
        if self.select == "top":
            return Chosen(norms.topk(k).indices.sort().values, None)
        # "random": all alike, but none without a gradient
        probabilities = inclusion(norms if self.select == "importance" else (norms != 0).double(), k)
        examples = systematic(probabilities, k)
        return Chosen(examples, probabilities[examples].reciprocal())

    def note(self, norms: Tensor) -> None:
        """Let "auto" learn from the norms of a mini-batch."""
        self._stands_for, self.rested = 1 + self.rested, 0
        spread = norms.var(correction=0) / norms.mean().square().clamp_min(1e-30)
        if norms.device.type == "cuda":
            arriving = torch.empty((), dtype=spread.dtype, pin_memory=True)
            self._arriving = arriving.copy_(spread, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._arriving, self._event = spread, None

    def _read_spread(self, *, wait: bool) -> None:
        if self._arriving is None:
            return
        if self._event is not None:
            if not wait and not self._event.query():
                return
            self._event.synchronize()
        spread, self._arriving = float(self._arriving), None
        if spread == spread:  # not NaN, of a step that overflowed
            smoothed = spread if self.spread is None else self.spread
            stays = _SMOOTHING**self._stands_for
            self.spread = stays * smoothed + (1 - stays) * spread


def inclusion(norms: Tensor, k: int) -> Tensor:
    """Probabilities proportional to the norms, capped at 1, that sum to k; [n], float64.

    >>> inclusion(torch.tensor([8.0, 1.0, 1.0]), 2)
    tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    scores = norms.double()
    # what is not finite is kept for sure, for a GradScaler to see
    finite = torch.where(scores.isfinite(), scores, 0.0)
    largest = finite.max().clamp_min(1e-300)
    scores = torch.where(scores.isfinite(), finite, largest * 1e6).clamp_min(largest * _LEAST_SCORE)
    ordered = scores.sort(descending=True).values
    # with the c largest capped, the rest share k - c in proportion: the least c that caps no more
    rest = ordered.flip(0).cumsum(0).flip(0)
    left = k - torch.arange(len(scores), dtype=scores.dtype, device=scores.device)
    fits = (ordered * left <= rest) | (left <= 1)
    # not left[capped]: an index of one element is read, and the device waited for
    capped = fits.int().argmax(0, keepdim=True)
    rate = left.gather(0, capped) / rest.gather(0, capped)
    return (scores * rate).clamp_max(1.0)


def systematic(probabilities: Tensor, k: int) -> Tensor:
    """k indices, each drawn with its probability, ascending."""
    order = torch.randperm(len(probabilities), device=probabilities.device)
    upper = probabilities[order].cumsum(0)
    start = torch.rand((), dtype=upper.dtype, device=upper.device)
    marks = (start + torch.arange(k, dtype=upper.dtype, device=upper.device)) * (upper[-1] / k)
    drawn = torch.searchsorted(upper, marks, right=True).clamp_max(len(order) - 1)
    return order[drawn].sort().values
