"""Looking at a rewrite: the generated code before and after."""

from __future__ import annotations

import difflib

from torch import nn

from fxprop.frontends.module import TracedModule
from fxprop.recipe import recipe_of


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
    recipe_of(gm)
    parts = [_diff(path, module) for path, module in gm.named_modules() if isinstance(module, TracedModule)]
    return "".join(parts)


def _diff(path: str, module: TracedModule) -> str:
    name = path or type(module).__name__
    before, after = (
        graphs[module.training].python_code("self").src
        for graphs in (module.fx_graphs_before, module.fx_graphs)
    )
    lines = difflib.unified_diff(
        before.strip().splitlines(keepends=True),
        after.strip().splitlines(keepends=True),
        f"{name} before",
        f"{name} after",
    )
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def generated_code(gm: nn.Module) -> str:
    """The generated code of every traced module, each under a comment with its name."""
    traced = [(path, m) for path, m in gm.named_modules() if isinstance(m, TracedModule)]
    if [path for path, _ in traced] == [""]:
        return str(traced[0][1].code).strip()
    return "\n\n".join(f"# {path or type(m).__name__}\n{m.code.strip()}" for path, m in traced)
