"""Looking at a rewrite: the generated code before and after."""

from __future__ import annotations

import difflib

from torch import nn

from fxprop.errors import ModelError
from fxprop.frontends.module import TracedModule


def code_diff(gm: nn.Module) -> str:
    """A unified diff of the generated code before and after the rewrite.

    >>> print(fxprop.code_diff(gm))
    --- ResNet before
    +++ ResNet after
    ...
    -    conv1 = self.conv1(x);  x = None
    +    conv1_weight = self.conv1.weight
    +    conv1 = fxprop_ops_conv2d(x, conv1_weight, None, stride = (7, 7), ..., k = 3, ...

    Empty if nothing was rewritten. For the mode (train or eval) the module is in. Raises ModelError for
    a module that does not come from `fxprop.transform`.
    """
    module = require_transformed(gm)
    assert module.graphs_before is not None
    name = type(module).__name__
    before, after = (
        graphs[module.training].python_code("self").src for graphs in (module.graphs_before, module.graphs)
    )
    lines = difflib.unified_diff(
        before.strip().splitlines(keepends=True),
        after.strip().splitlines(keepends=True),
        f"{name} before",
        f"{name} after",
    )
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def require_transformed(gm: nn.Module) -> TracedModule:
    """`gm` itself, if it comes from `fxprop.transform`; ModelError otherwise."""
    if not isinstance(gm, TracedModule) or gm.graphs_before is None:
        raise ModelError(f"got {type(gm).__name__}: expected the module that fxprop.transform returned")
    return gm
