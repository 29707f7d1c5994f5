"""The command line: arguments in, text out. Everything else is done by the public functions."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from fxprop.cli_bench import add_bench
from fxprop.cli_options import add_model_options, add_policy_options, on_model, policy_of
from fxprop.diff_colours import as_html, for_terminal
from fxprop.errors import CommandError, FxpropError
from fxprop.explain import explain
from fxprop.inspect import code_diff, generated_code
from fxprop.plan import Site
from fxprop.report.report import Report
from fxprop.transform import Transformed, estimate, layers, transform
from fxprop.version import __version__

_EXAMPLES = """\
examples:
  fxprop report resnet50 --keep 0.05
  fxprop report vit_b_16 --policy policy.toml --format markdown -o report.md
  fxprop report mypackage.models:make_net --input 32x3x64x64 --model-args '{"width": 2}'
  fxprop report timm:convnext_tiny
  fxprop report hf:BertConfig --model-args '{"num_hidden_layers": 2}'
  fxprop layers mobilenet_v3_small
  fxprop code resnet18 --keep 0.1 --diff
  fxprop explain resnet50 layer3.0.conv2 --keep 0.05
  fxprop bench resnet50 --keep 0.25 0.1 0.05 --preset fast
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage (by argparse)."""
    args = _parser().parse_args(argv)
    try:
        text = args.run(args)
        _write(text, args.output)
    except BrokenPipeError:
        # the reader of our output left (`| head`); keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        _complain(error)
        return 1
    return 0


def _complain(error: Exception) -> None:
    message = " ".join(str(error).split())
    if not isinstance(error, FxpropError):
        message = f"unexpected {type(error).__name__}: {message} (--debug shows where)"
    print(f"fxprop: error: {message}", file=sys.stderr)


def _write(text: str, output: str) -> None:
    text = text if text.endswith("\n") or not text else text + "\n"
    if output == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxprop",
        description="Make a PyTorch model's backward pass cost less, and see what it saves.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fxprop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    report = _command(commands, "report", "the backward FLOPs a policy saves, layer by layer", _report)
    add_policy_options(report)
    report.add_argument("--format", choices=("text", "markdown", "json", "csv", "html"), default="text")

    _command(commands, "layers", "every layer a policy can name, with its shapes", _layers)

    code = _command(commands, "code", "the generated code of the transformed model", _code)
    add_policy_options(code)
    code.add_argument("--diff", action="store_true", help="only what the rewrite changed, layer by layer")
    code.add_argument("--format", choices=("text", "html"), default="text", help="html: of the --diff")

    layer = _command(commands, "explain", "one layer: what was decided, why, and what it costs", _explain)
    layer.add_argument("layer", metavar="LAYER", help="a name that `fxprop layers MODEL` lists")
    add_policy_options(layer)
    add_bench(commands)
    return parser


def _command(commands: Any, name: str, help: str, run: Callable[[argparse.Namespace], str]) -> Any:
    """A command on a model, with those of the examples that show it."""
    examples = [line for line in _EXAMPLES.splitlines() if line.startswith(f"  fxprop {name} ")]
    parser = commands.add_parser(
        name,
        help=help,
        description=f"Show {help}.",
        epilog="\n".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.set_defaults(run=run)
    return parser


def _report(args: argparse.Namespace) -> str:
    policy = policy_of(args)
    report: Report = on_model(
        args, lambda model, *rest, **options: estimate(model, policy, *rest, **options)
    )
    as_text = {
        "text": report.__str__,
        "markdown": report.to_markdown,
        "json": report.to_json,
        "csv": report.to_csv,
        "html": report.to_html,
    }
    return as_text[args.format]()


def _layers(args: argparse.Namespace) -> str:
    sites = on_model(args, layers)
    headers = ("layer", "type", "op", "weight", "output", "n channel", "n element", "")
    return tabulate([_row(site) for site in sites], headers, disable_numparse=True)


def _row(site: Site) -> list[Any]:
    def shape(sizes: Sequence[int] | None) -> str:
        return "-" if sizes is None else "x".join(map(str, sizes))

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
        site.n("channel") or "-",
        site.n("element") or "-",
        ", ".join(remarks),
    ]


def _transformed(args: argparse.Namespace) -> nn.Module:
    policy = policy_of(args)
    transformed: Transformed = on_model(
        args, lambda model, *rest, **options: transform(model, policy, *rest, **options)
    )
    return transformed.module


def _code(args: argparse.Namespace) -> str:
    if args.format == "html" and not args.diff:
        raise CommandError("--format html shows a diff: add --diff")
    gm = _transformed(args)
    if not args.diff:
        return generated_code(gm)
    diff = code_diff(gm)
    if args.format == "html":
        return as_html(diff)
    return for_terminal(diff) if _in_colour(args) else diff


def _in_colour(args: argparse.Namespace) -> bool:
    """Whether the reader is a terminal that was not asked to stay plain (no-color.org)."""
    return args.output == "-" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _explain(args: argparse.Namespace) -> str:
    return explain(_transformed(args), args.layer)
