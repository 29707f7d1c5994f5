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

    def arguments(self, without: Sequence[str]) -> dict[str, Any]:
        """As keywords of an operator that lacks `without`, without defaults that generated code omits."""
        return {
            name: value
            for name, value in self._asdict().items()
            if name not in without and (name in _ALWAYS or value != _DEFAULTS[name])
        }


_ALWAYS = ("k", "select", "score")
_DEFAULTS: dict[str, Any] = {name: Keep._field_defaults[name] for name in Keep._fields[1:]}
