"""`fxprop code`, `explain` and `dump`: looking at the rewritten graph."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from torch import nn

from fxprop.cli.options import (
    add_model_options,
    add_policy_options,
    add_tune_options,
    by_policy,
    command,
    complete_with,
    shows_progress,
)
from fxprop.errors import CommandError
from fxprop.inspection.code import backward_code, code_diff, generated_code
from fxprop.inspection.dump import dump
from fxprop.inspection.explain import explain
from fxprop.pipeline.transform import transform
from fxprop.policy.policy import Policy
from fxprop.report.forms.diff_colours import as_html, for_terminal
from fxprop.timing.tune import tune


def add_code(commands: Any) -> None:
    """Add the commands to the parser's subcommands."""
    code = command(
        commands,
        "code",
        "show the generated code of the transformed model, or what the rewrite changed in it",
        """
        fxprop code resnet18 --keep 0.1
        fxprop code resnet18 --keep 0.1 --diff
        fxprop code resnet18 --examples 0.5 --backward
        fxprop code resnet18 --keep 0.1 --diff --format html -o diff.html
        """,
        _code,
    )
    add_model_options(code)
    add_policy_options(code)
    code.add_argument("--diff", action="store_true", help="only what the rewrite changed, layer by layer")
    code.add_argument(
        "--backward",
        action="store_true",
        help="the backward that --examples makes: what runs on all, the cut, what runs on the kept",
    )
    code.add_argument("--format", choices=("text", "html"), default="text", help="html: only with --diff")

    layer = command(
        commands,
        "explain",
        "show what was decided about one layer, why, and what it costs",
        """
        fxprop explain resnet50 layer3.0.conv2 --keep 0.05
        fxprop explain resnet50 layer3.0.conv2 --keep 0.05 --tune
        """,
        _explain,
    )
    add_model_options(layer)
    layer.add_argument("layer", metavar="LAYER", help="a name that `fxprop layers MODEL` lists")
    add_policy_options(layer)
    add_tune_options(layer, "time its backward first, dense and sparse, on this machine")

    files = command(
        commands,
        "dump",
        "write everything about a rewrite to a folder: code, diff, reports, policy, environment",
        """
        fxprop dump resnet50 for_the_bug_report --keep 0.05
        fxprop dump mypackage.models:make_net folder --input 32x3x64x64
        """,
        _dump,
    )
    add_model_options(files)
    folder = files.add_argument("folder", metavar="DIR", help="created if it does not exist")
    complete_with(folder, "DIRECTORY")
    add_policy_options(files)


def _code(args: argparse.Namespace) -> str:
    if args.format == "html" and not args.diff:
        raise CommandError("--format html shows a diff: add --diff")
    if args.backward and args.diff:
        raise CommandError("--backward and --diff given: give one of them")
    gm = by_policy(args, transform).module
    if args.backward:
        return backward_code(gm)
    if not args.diff:
        return generated_code(gm)
    diff = code_diff(gm)
    if args.format == "html":
        return as_html(diff)
    return for_terminal(diff) if _in_colour(args) else diff


def _in_colour(args: argparse.Namespace) -> bool:
    """Whether the output goes to a terminal where colour is not switched off (no-color.org)."""
    return args.output == "-" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _explain(args: argparse.Namespace) -> str:
    def of_layer(model: nn.Module, policy: Policy, inputs: Any, **options: Any) -> str:
        gm = transform(model, policy, inputs, **options).module
        if args.tune:
            tune(
                gm,
                inputs,
                example_kwargs=options["example_kwargs"],
                cache=args.tune_cache,
                names=[args.layer],
                progress=shows_progress(args),
            )
        return explain(gm, args.layer)

    return by_policy(args, of_layer, real=args.tune)


def _dump(args: argparse.Namespace) -> str:
    return "\n".join(map(str, dump(by_policy(args, transform).module, args.folder)))
