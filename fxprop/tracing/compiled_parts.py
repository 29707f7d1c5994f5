"""Modules that torch.compile was applied to, as a whole or in place, inside a model.

Their code is run and traced as it was before. What `torch.compile` made is found by its names, since the
import of torch's compiler takes a second.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# where Module.compile() keeps the compiled call, which copies (torch's own, too) leave out
IN_PLACE = "_compiled_call_impl"


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is what `torch.compile(...)` returned."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def original_of(module: nn.Module) -> nn.Module:
    """The module that was given to torch.compile."""
    original = module._modules["_orig_mod"]
    assert original is not None
    return original


def compiled_again(module: nn.Module, original: nn.Module) -> nn.Module:
    """`original` compiled as `module` was (the way in which such modules are pickled)."""
    twin: nn.Module = type(module)(original, vars(module)["dynamo_ctx"])
    return twin


def uncompile(root: nn.Module) -> None:
    """Let what was compiled in `root`, a copy, run as it did before."""
    for module in root.modules():
        if is_compiled(module):
            vars(module)["forward"] = _calling(original_of(module))


def compiled_in(root: nn.Module) -> list[str]:
    """The names of the modules in `root` that were compiled, by torch.compile or in place."""
    return [
        name
        for name, module in root.named_modules()
        if is_compiled(module) or vars(module).get(IN_PLACE) is not None
    ]


def _calling(original: nn.Module) -> Any:
    # the attribute is looked up when it is called: torch.fx patches calls of modules while it traces
    return lambda *args, **kwargs: original(*args, **kwargs)
