"""What is kept in one call of a sparse operator: constants that travel beside the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fxprop import settings
from fxprop.settings import BiasGrad, KeepArgs, LayerSettings, NormGrad, Select, WeightGrad


class Keep(NamedTuple):
    """The sparsity of one call. The fields are the operators' keywords."""

    # how many, or of what is counted at run time the share
    k: int | float
    select: Select = "channel"
    score: str = "l1"
    bias_grad: BiasGrad = "full"
    sync_selection: bool = False
    score_fraction: float = 1.0
    norm_grad: NormGrad = "full"
    weight_grad: WeightGrad = "dense"
    score_weight: bool = False
    # for grad_input, and for grad_weight; None: k. 0 is nothing
    k_input: int | float | None = None
    k_weight: int | float | None = None
    chained: bool = False

    @classmethod
    def given(cls, op: str, keep: KeepArgs, without: Sequence[str]) -> Keep:
        """What a call of `op` says; TypeError, as of any function, for keywords that it does not have."""
        for name in keep:
            if name in without or name not in cls._fields:
                raise TypeError(f"{op}() got an unexpected keyword argument {name!r}")
        if "k" not in keep:
            raise TypeError(f"{op}() missing 1 required keyword-only argument: 'k'")
        # by position, as torch.compile wants it
        others: list[Any] = [keep.get(name, default) for name, default in _DEFAULTS.items()]
        return cls(keep["k"], *others)

    @classmethod
    def of(cls, k: int | float, of_layer: LayerSettings, chained: bool) -> Keep:
        """What a plan says of one layer."""
        return cls(k, **dict(settings.keywords(of_layer)), chained=chained)

    @property
    def of_input(self) -> int | float:
        """How many are kept for grad_input."""
        return self.k if self.k_input is None else self.k_input

    @property
    def of_weight(self) -> int | float:
        """How many are kept for grad_weight."""
        return self.k if self.k_weight is None else self.k_weight

    @property
    def is_one(self) -> bool:
        """Whether both gradients are made of the same."""
        return self.k_input is None and self.k_weight is None and not self.score_weight

    def only(self, k: int | float) -> Keep:
        """The same with k for both."""
        return self._replace(k=k, k_input=None, k_weight=None, score_weight=False)

    @property
    def larger(self) -> Keep:
        """The same with the larger one for both; by one score it has all that the smaller has."""
        return self if self.is_one else self.only(max(self.of_input, self.of_weight))

    def scaled(self, n: int, of: int) -> Keep:
        """The shares that these are of `of` features, of n."""

        def scale(k: int | float) -> int:
            return max(1, int(k * n / of + 0.5)) if k else 0

        of_input, of_weight = (None if k is None else scale(k) for k in (self.k_input, self.k_weight))
        return self._replace(k=scale(self.k), k_input=of_input, k_weight=of_weight)

    def needs(self, needed: tuple[bool, bool, bool]) -> tuple[bool, bool, bool]:
        """Of input, weight and bias, which get a gradient if `needed` are asked for."""
        input, weight, bias = needed
        of_weight = self.of_weight != 0
        return (
            input and self.of_input != 0,
            weight and of_weight,
            bias and (of_weight or self.bias_grad == "full"),
        )

    def arguments(self, without: Sequence[str]) -> dict[str, Any]:
        """As keywords of an operator that lacks `without`, without defaults that generated code omits."""
        return {
            name: value
            for name, value in self._asdict().items()
            if name not in without and (name in _ALWAYS or value != _DEFAULTS[name])
        }


_ALWAYS = ("k", "select", "score")
_DEFAULTS: dict[str, Any] = {name: Keep._field_defaults[name] for name in Keep._fields[1:]}
