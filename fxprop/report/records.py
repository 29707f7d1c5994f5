"""The report as data: one record per layer, and totals that add up. `forms` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from fxprop.ops.axes import Shape
from fxprop.plan.decisions import Status
from fxprop.policy.step_time import Clock
from fxprop.report.units import Unit
from fxprop.settings import ExamplesSelect, Select, WeightGrad
from fxprop.version import __version__

SCHEMA = 1


@dataclass(frozen=True)
class Gradients:
    """FLOPs of a layer's two gradients; one multiply-add is 2."""

    grad_input: int
    grad_weight: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.grad_input + self.grad_weight

    def of_part(self, k: int, n: int) -> Gradients:
        """For k of n examples."""
        return Gradients(self.grad_input * k // n, self.grad_weight * k // n)

    def to_dict(self) -> dict[str, int]:
        """As in the report schema."""
        return {"grad_input": self.grad_input, "grad_weight": self.grad_weight}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One site in the report, its fields in the schema's order. FLOPs are None without example inputs."""

    name: str
    op: str
    status: Status
    reason: str | None
    decided_by: str
    source: str | None
    # qualified name of the module whose graph or code it is in; "" is the model itself
    graph: str = ""
    # what is rewritten with the layer: "batch_norm + relu"; None if it is rewritten alone
    region: str | None = None
    # "dense" or "row_sparse", of a rewritten layer
    weight_grad: WeightGrad | None = None
    # the layer upstream that reads only a part of grad_input, which is all that is computed
    chain: str | None = None
    # settings that have no meaning at the layer, and why
    left_out: tuple[str, ...] = ()
    input_shape: Shape | None
    weight_shape: Shape | None
    output_shape: Shape | None
    groups: int
    select: Select | None
    score: str | None
    # the larger of the two below
    k: int | None
    # kept for grad_input and for grad_weight
    k_input: int | None = None
    k_weight: int | None = None
    n: int | None
    # whether a gradient arrives: not where all layers behind it keep nothing for grad_input
    reached: bool = True
    forward: int | None = None
    # the ordinary backward
    dense: Gradients | None = None
    # the arithmetic that the kept entries need
    sparse: Gradients | None = None
    # the arithmetic that fxprop's kernels perform
    executed: Gradients | None = None
    # element operations spent on scoring and top-k
    select_ops: int | None = None

    def of_part(self, k: int, n: int) -> Layer:
        """This layer where k of n examples enter its backward."""
        if k == n or self.sparse is None or self.executed is None or self.select_ops is None:
            return self
        return replace(
            self,
            sparse=self.sparse.of_part(k, n),
            executed=self.executed.of_part(k, n),
            select_ops=self.select_ops * k // n,
        )

    def to_dict(self) -> dict[str, Any]:
        """As in the report schema."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Gradients):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class ExamplesKept:
    """The part of the mini-batch that enters the backward."""

    # as in the policy: a share, or "auto"
    share: float | Literal["auto"]
    select: ExamplesSelect
    # examples in the example inputs; None without
    n: int | None
    # how many of them are kept; of "auto", the fewest
    k: int | None
    # why all of them enter all the same; empty if they do not
    off: str = ""

    @property
    def factor(self) -> tuple[int, int]:
        """What all counts of the backward are multiplied by, and divided by; "auto" counts as all."""
        if self.off or self.share == "auto" or self.k is None or self.n is None:
            return 1, 1
        return self.k, self.n


@dataclass(frozen=True)
class Totals:
    """Sums over the layers; None where there were no example inputs."""

    forward: int | None
    dense: int | None
    sparse: int | None
    executed: int | None
    select_ops: int | None
    # backward FLOPs outside the listed sites, and of skipped layers
    other: int | None
    # 1 - (executed + other_executed) / (dense + other)
    saving: float | None
    # `other` for the examples that are kept
    other_executed: int | None = None


@dataclass(frozen=True)
class ReportData:
    """What every form of the report shows.

    Counts are FLOPs of one backward pass; `Report` says what the columns mean.
    """

    model: str
    frontend: str
    # "train" or "eval": the mode the model was in
    mode: str
    layers: tuple[Layer, ...]
    other: int | None
    note: str = ""
    # modules that are not in a graph but run as written, and why
    untraced: tuple[tuple[str, str], ...] = ()
    # what part of the mini-batch enters the backward; None where the policy takes all
    examples: ExamplesKept | None = None
    # how many times as fast backward and step should be; None where nothing is left out, or not known
    clock: Clock | None = None
    # the policy as in a policy file
    policy: Mapping[str, Any] | None = field(default=None, hash=False)

    @cached_property
    def listed(self) -> tuple[Layer, ...]:
        """The layers that could be rewritten: all that are not skipped."""
        return tuple(layer for layer in self.layers if layer.status != "skipped")

    @cached_property
    def totals(self) -> Totals:
        """The columns summed; `saving` is 0.0 for a backward without FLOPs."""
        if self.other is None:
            return Totals(None, None, None, None, None, None, None)
        sums = {
            column: sum(g.total for layer in self.layers if (g := getattr(layer, column)))
            for column in ("dense", "sparse", "executed")
        }
        whole = sums["dense"] + self.other
        k, n = (1, 1) if self.examples is None else self.examples.factor
        other_executed = self.other * k // n
        saving = 1 - (sums["executed"] + other_executed) / whole if whole else 0.0
        return Totals(
            forward=sum(layer.forward or 0 for layer in self.layers),
            select_ops=sum(layer.select_ops or 0 for layer in self.layers),
            other=self.other,
            other_executed=other_executed,
            saving=saving,
            **sums,
        )

    @cached_property
    def unit(self) -> Unit:
        """The unit that people get the numbers in."""
        return Unit.of(None if self.other is None else (self.totals.dense or 0) + self.other)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, under the names of the fields; `schema` counts its versions."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "frontend": self.frontend,
            "mode": self.mode,
            "fxprop": __version__,
            "torch": torch.__version__,
            "flops_per_multiply_add": 2,
            "layers": [layer.to_dict() for layer in self.layers],
            "totals": vars(self.totals),
            "clock": None if self.clock is None else self.clock.to_dict(),
            "untraced": [{"name": name, "reason": reason} for name, reason in self.untraced],
            "examples": None if self.examples is None else vars(self.examples),
            "policy": None if self.policy is None else dict(self.policy),
        }
