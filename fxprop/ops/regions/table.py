"""The regions: what may lie behind a layer and be rewritten with it. The longest that fits wins.

Another region is another operator beside this file, and its row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprop.ops.activations import ACTIVATIONS
from fxprop.ops.axes import Axes
from fxprop.ops.regions import conv_batch_norm, conv_group_norm, linear_activation
from fxprop.settings import LayerSettings


def _never(of_layer: LayerSettings) -> bool:
    return False


def _no_arguments(norm: Any) -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True)
class RegionKind:
    """One row of the table."""

    # the operator that stands for the region in generated code, and the keywords it lacks
    sparse: Callable[..., Any]
    without: tuple[str, ...]
    # what the layer itself is, by operator
    operators: tuple[str, ...]
    # what it is rewritten with: a norm, which the operator takes as a module, and an activation
    norms: tuple[type[nn.Module], ...]
    # None: there may be none
    activations: tuple[str | None, ...]
    # whether it is better rewritten as one than left alone: (axes, whether the layer has a bias, settings)
    wins: Callable[[Axes, bool, LayerSettings], bool]
    # "batch_norm"; "" without a norm
    norm_name: str = ""
    # whether its backward reads only a part of its gradient, so that the layer behind can compute less
    reads_part: Callable[[LayerSettings], bool] = _never
    # what makes another norm like this one, of the same class
    norm_arguments: Callable[[Any], tuple[Any, ...]] = _no_arguments

    @property
    def name(self) -> str:
        """The operator's."""
        return self.sparse.__name__

    def label(self, activation: str | None) -> str:
        """What a layer is rewritten with: "batch_norm + relu"."""
        return " + ".join(filter(None, (self.norm_name, activation)))


# entries of a region from which on one pass over them beats the separate kernels
_LEAST = {"l2": 2**19, "random": 2**19, "l1": 2**22}


def _batch_norm_wins(axes: Axes, has_bias: bool, of_layer: LayerSettings) -> bool:
    if axes.entries is None or of_layer.norm_grad == "kept":
        return True
    return axes.entries >= _LEAST[of_layer.score]


def _group_norm_wins(axes: Axes, has_bias: bool, of_layer: LayerSettings) -> bool:
    # smaller ones stay in the cache, where writing the norm's whole gradient costs little
    return axes.entries is None or axes.entries >= 2**20


def _activation_wins(axes: Axes, has_bias: bool, of_layer: LayerSettings) -> bool:
    # a full pass over the gradient behind the activation costs what the activation's backward does
    return of_layer.score_fraction <= 0.5 and not (has_bias and of_layer.bias == "full")


REGIONS = {
    kind.name: kind
    for kind in (
        RegionKind(
            sparse=conv_batch_norm.conv_batch_norm,
            without=conv_batch_norm.WITHOUT,
            operators=("conv1d", "conv2d", "conv3d"),
            norms=conv_batch_norm.NORMS,
            activations=("relu", None),
            wins=_batch_norm_wins,
            norm_name="batch_norm",
            reads_part=lambda of: conv_batch_norm.reads_part(of.norm_grad, of.score_fraction),
            norm_arguments=lambda norm: (norm.num_features,),
        ),
        RegionKind(
            sparse=conv_group_norm.conv_group_norm,
            without=conv_group_norm.WITHOUT,
            operators=("conv1d", "conv2d", "conv3d"),
            norms=(nn.GroupNorm,),
            activations=tuple(ACTIVATIONS),  # without one it is no faster than the norm alone
            wins=_group_norm_wins,
            norm_name="group_norm",
            norm_arguments=lambda norm: (norm.num_groups, norm.num_channels),
        ),
        RegionKind(
            sparse=linear_activation.linear_activation,
            without=linear_activation.WITHOUT,
            operators=("linear",),
            norms=(),
            activations=tuple(ACTIVATIONS),
            wins=_activation_wins,
        ),
    )
}
