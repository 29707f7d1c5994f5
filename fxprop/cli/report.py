"""`fxprop report`, `layers` and `plot`: what a policy saves, and what it can name."""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxprop.cli.options import (
    add_model_options,
    add_policy_options,
    by_policy,
    command,
    on_model,
    positive,
)
from fxprop.errors import CommandError
from fxprop.inspection.code import code_diff
from fxprop.ops.selections import SELECTIONS
from fxprop.pipeline.recipe import recipe_of
from fxprop.pipeline.transform import estimate, layers, transform
from fxprop.plan.sites import Site
from fxprop.report.by_module import Depth
from fxprop.report.forms import picture as plot
from fxprop.report.report import WIDTH
from fxprop.report.wording import shape

# columns of the list of layers that a narrow terminal does without, first those that say least
_LEAST = ("type", "n row", "n element", "output", "op")
_PICTURES = ("svg", "png", "pdf")
# selections that keep a number of things
_COUNTED = tuple(select for select, of in SELECTIONS.items() if not of.exact)


def add_report(commands: Any) -> None:
    """Add the commands to the parser's subcommands."""
    report = command(
        commands,
        "report",
        "show the backward FLOPs a policy saves, layer by layer",
        """
        fxprop report resnet50 --keep 0.05
        fxprop report resnet50 --format html -o report.html
        fxprop report resnet152 --all
        fxprop report vit_b_16 --policy policy.toml --format markdown -o report.md
        fxprop report mypackage.models:make_net --model-args '{"width": 2}'
        fxprop report timm:convnext_tiny
        fxprop report hf:BertConfig --model-args '{"num_hidden_layers": 2}'
        """,
        _report,
    )
    add_model_options(report)
    add_policy_options(report)
    report.add_argument(
        "--format",
        choices=("text", "markdown", "json", "csv", "html"),
        default="text",
        help="html: a page for a browser, with the code diff",
    )
    rows = report.add_mutually_exclusive_group()
    rows.add_argument(
        "--depth",
        type=positive,
        metavar="N",
        help="text, markdown: module levels to show, 1 for the model's own children "
        "(default: the deepest at which layers share lines; small models are shown whole)",
    )
    rows.add_argument("--all", action="store_true", help="text, markdown: a line for every layer")

    listing = command(
        commands,
        "layers",
        "list every layer a policy can name, with its shapes",
        """
        fxprop layers mobilenet_v3_small
        fxprop layers mypackage.models:make_net --input 32x3x64x64
        """,
        _layers,
    )
    add_model_options(listing)

    picture = command(
        commands,
        "plot",
        "draw the backward FLOPs of every layer, dense and executed",
        """
        fxprop plot resnet50 --keep 0.05 -o savings.svg
        fxprop plot vit_b_16 --preset fast -o savings.png
        fxprop plot resnet18 --format png -o - > savings.png
        """,
        _plot,
    )
    add_model_options(picture)
    add_policy_options(picture)
    picture.add_argument(
        "--format", choices=_PICTURES, help="default: by the ending of FILE; svg on standard output"
    )


def _report(args: argparse.Namespace) -> str:
    if args.format == "html":
        made = by_policy(args, transform)
        return made.report.to_html(code_diff(made.module), recipe_of(made.module).backward)
    report = by_policy(args, estimate)
    depth: Depth = "all" if args.all else args.depth
    if args.format == "text":
        return report.to_text(None if args.output == "-" else WIDTH, depth)
    if args.format == "markdown":
        return report.to_markdown(depth or "all")
    return report.to_json() if args.format == "json" else report.to_csv()


def _layers(args: argparse.Namespace) -> str:
    sites = on_model(args, layers)
    headers = ["layer", "type", "op", "weight", "output", *(f"n {select}" for select in _COUNTED), ""]
    rows = [_row(site) for site in sites]
    # a table whose lines are broken cannot be read; whoever reads from a pipe wants all columns
    width = shutil.get_terminal_size().columns if args.output == "-" and sys.stdout.isatty() else None
    kept = list(range(len(headers)))
    while True:
        text = tabulate(
            [[row[i] for i in kept] for row in rows], [headers[i] for i in kept], disable_numparse=True
        )
        least = next((i for name in _LEAST if (i := headers.index(name)) in kept), None)
        if width is None or least is None or max(map(len, text.splitlines()), default=0) <= width:
            return text
        kept.remove(least)


def _row(site: Site) -> Sequence[Any]:
    remarks = [
        *(["first"] if site.is_first else []),
        *(["output layer"] if site.is_output else []),
        *([f"skipped: {site.skip}"] if site.skip else []),
    ]
    return [
        site.name,
        site.type or "-",
        site.op,
        shape(site.weight_shape),
        shape(site.output_shape),
        *(site.n(select) or "-" for select in _COUNTED),
        ", ".join(remarks),
    ]


def _plot(args: argparse.Namespace) -> str | bytes:
    ending = Path(args.output).suffix.removeprefix(".")
    form = args.format or ("svg" if args.output == "-" else ending)
    if form not in _PICTURES:
        raise CommandError(
            f"-o {args.output}: expected a name that ends in {', '.join(_PICTURES)}, or --format"
        )
    picture = io.BytesIO()
    plot.save(plot.figure(by_policy(args, estimate)), picture, form)
    return picture.getvalue().decode() if form == "svg" else picture.getvalue()
