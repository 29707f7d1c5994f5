"""Traced: a model with its graphs, whichever front-end made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxprop.errors import InputError
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.observe.records import Run

# the arguments of an example call, and those given by name
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass
class Traced:
    """A copy of a model's tree in which the modules that could be traced are TracedModules.

    The copy shares every tensor with the model.
    """

    root: nn.Module
    frontend: str
    # qualified name -> the traced module there; "" is the model itself
    pieces: dict[str, TracedModule] = field(default_factory=dict)
    # modules that run as they are written, and why; the products in their own code have no graph
    untraced: dict[str, str] = field(default_factory=dict)
    # of those: the parameters that their own code multiplies by, named in the model
    products: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # modules with matrices that stay as they are, and why
    opaque: dict[str, str] = field(default_factory=dict)
    # placeholder -> parameter, where parameters are inputs of the graph
    parameters: Mapping[str, str] = field(default_factory=dict)
    # by mode: the run on the example inputs by which it was held against the model, or how that failed
    runs: dict[bool, Run | InputError] = field(default_factory=dict)

    @property
    def training(self) -> bool:
        """The mode the model is in."""
        return self.root.training

    @property
    def other_mode_differs(self) -> bool:
        """Whether some graph is another one in the mode the model is not in."""
        here = self.training
        return any(
            (not here) in piece.fx_graphs and piece.fx_graphs[not here] is not piece.fx_graphs[here]
            for piece in self.pieces.values()
        )
