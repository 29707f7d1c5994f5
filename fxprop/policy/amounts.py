"""How much is kept of a site for each of its two gradients, by the settings that hold for it."""

from __future__ import annotations

import math
from typing import NamedTuple

from fxprop.ops.selections import SELECTIONS
from fxprop.plan.decisions import Kept
from fxprop.settings import AMOUNTS, RuleSettings, Settings


class Asked(NamedTuple):
    """Of one gradient: a share, or a number k; all with neither."""

    share: float | None
    k: int | None

    @property
    def is_all(self) -> bool:
        """Whether all is asked for, however many there are."""
        return self.k is None and self.share in (None, 1)


def asked_of(settings: Settings) -> tuple[Asked, Asked]:
    """For grad_input and for grad_weight.

    >>> asked_of(Policy(keep=0.25, keep_weight=0))
    (Asked(share=0.25, k=None), Asked(share=0, k=None))
    """
    whole = Asked(settings.keep, settings.k)
    own = (settings.keep_input, settings.keep_weight)
    of_input, of_weight = (whole if share is None else Asked(share, None) for share in own)
    return of_input, of_weight


def kept_of(settings: Settings, asked: Asked, n: int) -> Kept:
    """What is kept of n."""
    selection = SELECTIONS[settings.select]
    if asked.share == 0:
        return Kept(0)
    if selection.exact:
        return Kept(n)
    k, at_run_time = asked.k, None
    if k is None:
        share = 1.0 if asked.share is None else float(asked.share)
        k = max(1, math.floor(share * n + 0.5))
        at_run_time = share if selection.counts_batch else None
    round_to = 1 if selection.counts_batch and asked.k is None else settings.round_to
    return Kept(min(n, -(-k // round_to) * round_to), at_run_time)


def given_by(rule: RuleSettings) -> dict[str, float]:
    """What a rule says of how much is kept."""
    return {name: getattr(rule, name) for name in AMOUNTS if getattr(rule, name) is not None}
