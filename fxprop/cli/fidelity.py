"""`fxprop fidelity` and `fxprop plan`: what a policy's gradients are worth, and which policy pays."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from torch import nn

from fxprop.cli.batches import add_batches_options, batches_and_loss, read_batches
from fxprop.cli.options import (
    add_model_options,
    add_policy_options,
    by_policy,
    command,
    complete_with,
    on_model,
    shows_progress,
)
from fxprop.pipeline.transform import transform
from fxprop.policy.files import to_toml
from fxprop.policy.policy import Policy
from fxprop.training.budget import BudgetOf
from fxprop.training.fidelity import fidelity
from fxprop.training.recommend import recommend


def add_fidelity(commands: Any) -> None:
    """Add the commands to the parser's subcommands."""
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
    add_batches_options(parser)
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    picture = parser.add_argument("--plot", metavar="FILE", help="energy, cosine, progress; .svg or .png")
    complete_with(picture, "FILE")

    plan = command(
        commands,
        "plan",
        "find the policy that makes most progress per second on this machine, or dense",
        """
        fxprop plan resnet18 --batches mypackage.data:train_batches
        fxprop plan resnet18 --weights DEFAULT --batches mypackage.data:train_batches --freeze
        fxprop plan vit_b_16 --input 8x3x224x224
        """,
        _plan,
    )
    add_model_options(plan)
    add_batches_options(plan)
    plan.add_argument(
        "--freeze", action="store_true", help="for fine-tuning: also try to leave out the first parts"
    )
    plan.add_argument(
        "--budget", type=float, metavar="SHARE", help="what a plan may cost of a dense step, 0 < share <= 1"
    )
    plan.add_argument(
        "--budget-of",
        choices=get_args(BudgetOf),
        default="time",
        help="of the step's time (default), or of the backward's FLOPs",
    )
    plan.add_argument(
        "--format", choices=("text", "markdown", "json", "toml"), default="text", help="toml: a policy file"
    )


def _fidelity(args: argparse.Namespace) -> str:
    given = read_batches(args)

    def compare(model: nn.Module, policy: Policy, inputs: Any, **options: Any) -> str:
        batches, loss = batches_and_loss(args, given, inputs, options["example_kwargs"])
        gm = transform(model, policy, inputs, **options).module
        found = fidelity(gm, batches, loss, progress=shows_progress(args))
        if args.plot is not None:
            found.plot(args.plot)
        if args.format == "json":
            return found.to_json()
        text = found.render("github" if args.format == "markdown" else "simple")
        return text if args.batches is not None else f"{text}\n\nOn random numbers: see --batches."

    return by_policy(args, compare, real=True)


def _plan(args: argparse.Namespace) -> str:
    given = read_batches(args)

    def find(model: nn.Module, inputs: Any, **options: Any) -> str:
        batches, loss = batches_and_loss(args, given, inputs, options["example_kwargs"])
        gm = transform(model, 1.0, inputs, **options).module
        found = recommend(
            *(gm, batches, loss),
            freeze=args.freeze,
            budget=args.budget,
            budget_of=args.budget_of,
            progress=shows_progress(args),
        )
        if args.format == "json":
            return found.to_json()
        if args.format == "toml":
            return to_toml(found.policy)
        style = "github" if args.format == "markdown" else "simple"
        return found.render(style, judged=args.batches is not None)

    return on_model(args, find, real=True)
