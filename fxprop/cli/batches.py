"""Mini-batches for commands that look at gradients: those of the user's function, or random numbers."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprop.cli.models.sources import named_object
from fxprop.cli.options import positive
from fxprop.errors import CommandError
from fxprop.pytree import tree_leaves, tree_map

_Loss = Callable[[Tensor, Tensor], Tensor]
_LOSSES: dict[str, _Loss] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def add_batches_options(parser: argparse.ArgumentParser) -> None:
    """Where the mini-batches come from, and what their loss is."""
    parser.add_argument(
        "--batches",
        metavar="PACKAGE.MODULE:NAME",
        help="a function without arguments that gives mini-batches, pairs of input and labels (default: "
        "random numbers of the shape of the input, and the mean square of the outputs for a loss); their "
        "shape is --input's default",
    )
    parser.add_argument("--loss", choices=tuple(_LOSSES), default="cross_entropy", help="with --batches")
    parser.add_argument("--count", type=positive, default=4, help="mini-batches, at most (default 4)")


def read_batches(args: argparse.Namespace) -> list[Any] | None:
    """Those of the user's function; then inputs of their shape are the model's, unless --input is given."""
    if args.batches is None:
        return None
    make = named_object(args.batches)
    try:
        batches = list(itertools.islice(make() if callable(make) else make, args.count))
    except Exception as error:
        raise CommandError(f"--batches {args.batches}: {type(error).__name__}: {error}") from error
    if not batches:
        raise CommandError(f"--batches {args.batches}: expected mini-batches, and it gives none")
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise CommandError(f"--batches {args.batches}: expected pairs of input and labels")
    first = batches[0][0]
    if not args.input and isinstance(first, Tensor):
        dtype = str(first.dtype).removeprefix("torch.")
        args.input = [f"{'x'.join(map(str, first.shape))}:{dtype}"]
    return batches


def batches_and_loss(
    args: argparse.Namespace, batches: list[Any] | None, inputs: Any, kwargs: Mapping[str, Any]
) -> tuple[list[Any], Callable[[nn.Module, Any], Tensor]]:
    """The user's, or random numbers, as `fxprop.fidelity` takes it."""
    if batches is not None:
        loss = _LOSSES[args.loss]
        return batches, lambda gm, batch: loss(gm(batch[0]), batch[1])
    given = tuple(inputs or ()), dict(kwargs)
    return [tree_map(_another, given) for _ in range(max(args.count, 2))], _mean_square


def _another(value: Any) -> Any:
    """A tensor of random numbers of the same kind; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.rand_like(value) if value.is_floating_point() else value[torch.randperm(len(value))]


def _mean_square(gm: nn.Module, batch: Any) -> Tensor:
    args, kwargs = batch
    outputs = [t for t in tree_leaves(gm(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.float().square().mean() for t in outputs]).sum()
