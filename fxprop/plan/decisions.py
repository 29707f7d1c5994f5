"""What is decided for each site: Sparsity, Decision, Plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from fxprop.ops.keep import Keep
from fxprop.plan.sites import Region, Site
from fxprop.settings import LayerSettings

Status = Literal["rewritten", "dense", "skipped"]


@dataclass(frozen=True)
class Chain:
    """The region that a site's input comes from, and what it reads of the site's grad_input."""

    # name of the region's site
    upstream: str
    # kept and all channels
    k: int
    n: int
    # the part of the batch that it reads whole
    score_fraction: float


class Kept(NamedTuple):
    """What is kept for one of the two gradients."""

    # of n at the shapes of the example inputs
    k: int
    # what is kept of however many there are, where that is the batch's; None where k is one number
    share: float | None = None

    @property
    def amount(self) -> int | float:
        """As the operator takes it."""
        return self.k if self.share is None else self.share


@dataclass(frozen=True)
class Sparsity(LayerSettings):
    """What a rewritten site keeps: k of n, chosen how."""

    # of n at the shapes of the example inputs
    k: int
    n: int
    # what is kept of however many there are, where that is the batch's; None where k is one number
    share: float | None = None
    # for grad_input and for grad_weight, where that is less; by one score it is a part of what k keeps
    for_input: Kept | None = None
    for_weight: Kept | None = None
    # whether the site's region is rewritten as one call
    region: bool = False
    # set where grad_input is computed as far as the region upstream reads it
    chain: Chain | None = None

    @property
    def keep(self) -> Keep:
        """As the operator takes it."""
        # nothing at all has to be said of both
        parts = (self.for_input, self.for_weight) if self.k else self.kept
        k_input, k_weight = (None if part is None else part.amount for part in parts)
        keep = Keep.of(Kept(self.k, self.share).amount, self, chained=self.chain is not None)
        return keep._replace(k_input=k_input, k_weight=k_weight)

    @property
    def is_one(self) -> bool:
        """Whether as much is kept for both gradients."""
        return self.for_input is self.for_weight is None

    @property
    def kept(self) -> tuple[Kept, Kept]:
        """For grad_input and for grad_weight."""
        whole = Kept(self.k, self.share)
        return self.for_input or whole, self.for_weight or whole

    @property
    def of_each(self) -> tuple[int, int]:
        """k for grad_input and for grad_weight."""
        of_input, of_weight = self.kept
        return of_input.k, of_weight.k

    @property
    def stops(self) -> bool:
        """Whether one of the gradients is none at all, which is asked for whatever it costs."""
        return 0 in self.of_each

    @property
    def amount(self) -> str:
        """ "3"; with a share for each gradient "3+6", for grad_input and grad_weight."""
        return "+".join(map(str, dict.fromkeys(self.of_each)))

    @property
    def alone(self) -> Sparsity:
        """The same without what other sites have to do with it."""
        return replace(self, chain=None)


@dataclass(frozen=True)
class Timing:
    """How long a site's backward took; of a region, with its batch-norm and activation."""

    # medians in seconds
    dense: float
    sparse: float
    # "cpu", "cuda"
    device: str
    # whether sparse was faster by the margin that was asked for
    wins: bool

    def __str__(self) -> str:
        return (
            f"measured {1000 * self.dense:.2f} ms dense, {1000 * self.sparse:.2f} ms sparse on "
            f"{self.device}: {self.dense / self.sparse:.2f}x"
        )


@dataclass(frozen=True)
class Decision:
    """What happens to one site, and why."""

    site: Site
    status: Status
    # why it is dense or skipped; None where rewritten
    reason: str | None = None
    # set where (and only where) status is "rewritten"
    sparsity: Sparsity | None = None
    # which part of the policy decided: "rule 1 (name='fc')", "default", "output layer"
    decided_by: str = "default"
    # settings that have no meaning at the site, and why
    dropped: tuple[str, ...] = ()
    # whether a gradient arrives: False where all that lies behind keeps nothing for grad_input
    reached: bool = True

    @property
    def region(self) -> Region | None:
        """The region that is rewritten with the site; None if the site is rewritten alone."""
        return self.site.region if self.sparsity is not None and self.sparsity.region else None

    @property
    def node(self) -> str:
        """The graph node that stands for the site after the rewrite."""
        return self.site.node if self.region is None else self.region.nodes[-1]


@dataclass(frozen=True)
class Plan:
    """One decision per site, in graph order."""

    decisions: tuple[Decision, ...]

    @functools.cached_property
    def rewritten(self) -> tuple[Decision, ...]:
        """The decisions that change the graph."""
        return tuple(d for d in self.decisions if d.status == "rewritten")
