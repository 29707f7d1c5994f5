"""`fxprop fidelity`: how close the gradients by a policy are to the dense ones."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import shtab
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprop.cli.models.sources import named_object
from fxprop.cli.options import (
    add_model_options,
    add_policy_options,
    by_policy,
    command,
    complete_with,
    positive,
    shows_progress,
)
from fxprop.errors import CommandError
from fxprop.pipeline.transform import transform
from fxprop.policy.policy import Policy
from fxprop.pytree import tree_leaves, tree_map
from fxprop.training.fidelity import fidelity

_Loss = Callable[[Tensor, Tensor], Tensor]
_LOSSES: dict[str, _Loss] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def add_fidelity(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    parser = command(
        commands,
        "fidelity",
        "compare the gradients by a policy with the dense ones, layer by layer",
        """
        fxprop fidelity resnet18 --keep 0.25 --weights DEFAULT --batches mypackage.data:train_batches
        fxprop fidelity mypackage.models:make_net --input 32x3x64x64 --examples 0.5
        fxprop fidelity resnet18 --keep 0.25 --plot fidelity.svg
        """,
        _fidelity,
    )
    add_model_options(parser)
    add_policy_options(parser)
    parser.add_argument(
        "--batches",
        metavar="PACKAGE.MODULE:NAME",
        help="a function without arguments that gives mini-batches, pairs of input and labels (default: "
        "random numbers of the shape of the input, and the mean square of the outputs for a loss)",
    )
    parser.add_argument("--loss", choices=tuple(_LOSSES), default="cross_entropy", help="with --batches")
    parser.add_argument("--count", type=positive, default=4, help="mini-batches, at most (default 4)")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    picture = parser.add_argument("--plot", metavar="FILE", help="energy, cosine, progress; .svg or .png")
    complete_with(picture, shtab.FILE)


def _fidelity(args: argparse.Namespace) -> str:
    def compare(model: nn.Module, policy: Policy, inputs: Any, **options: Any) -> str:
        kwargs = options["example_kwargs"]
        if args.batches is None:
            batches = [tree_map(_another, (tuple(inputs or ()), kwargs)) for _ in range(max(args.count, 2))]
            loss: Callable[[nn.Module, Any], Tensor] = _mean_square
        else:
            batches, loss = _batches(args), functools.partial(_labelled, _LOSSES[args.loss])
        gm = transform(model, policy, inputs, **options).module
        found = fidelity(gm, batches, loss, progress=shows_progress(args))
        if args.plot is not None:
            found.plot(args.plot)
        if args.format == "json":
            return found.to_json()
        text = found.render("github" if args.format == "markdown" else "simple")
        return text if args.batches is not None else f"{text}\n\nOn random numbers: see --batches."

    text: str = by_policy(args, compare, real=True)
    return text


def _another(value: Any) -> Any:
    """A tensor of random numbers of the same kind; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.rand_like(value) if value.is_floating_point() else value[torch.randperm(len(value))]


def _mean_square(gm: nn.Module, batch: Any) -> Tensor:
    args, kwargs = batch
    outputs = [t for t in tree_leaves(gm(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.float().square().mean() for t in outputs]).sum()


def _labelled(loss: _Loss, gm: nn.Module, batch: Any) -> Tensor:
    return loss(gm(batch[0]), batch[1])


def _batches(args: argparse.Namespace) -> list[Any]:
    make = named_object(args.batches)
    try:
        batches = list(itertools.islice(make() if callable(make) else make, args.count))
    except Exception as error:
        raise CommandError(f"--batches {args.batches}: {type(error).__name__}: {error}") from error
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise CommandError(f"--batches {args.batches}: expected pairs of input and labels")
    return batches
