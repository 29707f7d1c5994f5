"""Which operators of a backward graph keep the examples of a mini-batch apart.

An operator does if what it computes of one example follows from that example alone; then the backward of
some examples is the backward graph fed with these. A sum over the examples is what a parameter's gradient
is, and may go on to nothing but gradients of parameters. Batch norm alone may do more: its backward sums
over the examples it is given.
"""

from __future__ import annotations

import torch
from torch import fx

from fxprop.compact.checks import CHECKS, RANKING, check_pointwise
from fxprop.compact.follow import FACTORIES, Examples, arguments_of, name_of, tensors_in, value_of


def joins_examples(node: fx.Node, examples: Examples) -> str | None:
    """Why what a node computes of one example may depend on others; None if it does not. Raises Unknown."""
    if is_batch_norm(node):
        return None
    if isinstance(node.meta.get("val"), int | torch.SymInt | torch.SymFloat | torch.SymBool):
        return None  # a size
    given = [examples.at(tensor) for tensor in tensors_in((*node.args, *node.kwargs.values()))]
    name = name_of(node)
    # sizes come in lists, and are not looked at
    if name in _OF_NUMBERS and any(examples.has(value_of(argument)) for argument in node.args):
        return "it computes with the number of examples"
    if not any(given):
        is_made = name not in (*FACTORIES, *_SPREADS) and examples.at(node) is not None
        return "it makes examples of something else" if is_made else None
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return check_pointwise(node, arguments_of(node), examples)
    check = CHECKS.get(name)
    if check is None:
        return f"{name} is not known to keep them apart"
    return check(node, arguments_of(node), examples)


# what gives each example the same
_SPREADS = ("aten.expand", "aten.repeat")
# what makes a tensor of numbers that are no sizes
_OF_NUMBERS = ("aten.scalar_tensor", "aten.full", "aten.arange")


def is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is of batch norm's backward, or was made of it by a decomposition."""
    origin = node.meta.get("original_aten", node.target)
    return str(getattr(origin, "overloadpacket", origin)) in _BATCH_NORM


_BATCH_NORM = (
    "aten.native_batch_norm_backward",
    "aten.cudnn_batch_norm_backward",
    "aten.miopen_batch_norm_backward",
    "aten.batch_norm_backward",
)


def reduces_by_rank(node: fx.Node) -> bool:
    """Whether what a node makes of all examples is no sum: fit to choose by, and not for a gradient."""
    return name_of(node).removeprefix("aten.") in RANKING
