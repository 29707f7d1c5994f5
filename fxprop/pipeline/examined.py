"""Whether the backward of a model can take some of the examples, for its recipe and report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprop.compact.cut import CannotCut
from fxprop.compact.examine import examine
from fxprop.compact.text import describe_cut
from fxprop.pipeline.arguments import count_examples
from fxprop.pipeline.recipe import Examined


def examined(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Examined:
    """Whether the backward of `model` can take some of the examples; nothing of it runs."""
    n = count_examples((args, kwargs))
    try:
        cut = examine(model, args, kwargs)
    except CannotCut as reason:
        return Examined(str(reason), n)
    return Examined("", n, describe_cut(cut, model))
