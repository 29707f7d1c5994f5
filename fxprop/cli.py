"""The command line: arguments in, text out. Everything else is done by the public functions."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxprop.checks import FRONTENDS
from fxprop.errors import CommandError, FxpropError, ValuesNeededError
from fxprop.inspect import code_diff, generated_code
from fxprop.model_sources import Loaded, Source, load
from fxprop.ops.select import score_names
from fxprop.plan import SELECTS, Site
from fxprop.policy import Policy
from fxprop.policy_files import load_policy
from fxprop.report.report import Report
from fxprop.transform import Transformed, estimate, layers, transform
from fxprop.version import __version__

_DEFAULT_KEEP = 0.05

_EXAMPLES = """\
examples:
  fxprop report resnet50 --keep 0.05
  fxprop report vit_b_16 --policy policy.toml --format markdown -o report.md
  fxprop report mypackage.models:make_net --input 32x3x64x64 --model-args '{"width": 2}'
  fxprop report timm:convnext_tiny
  fxprop report hf:BertConfig --model-args '{"num_hidden_layers": 2}'
  fxprop layers mobilenet_v3_small
  fxprop code resnet18 --keep 0.1 --diff
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

    report = commands.add_parser("report", help="the backward FLOPs a policy saves, layer by layer")
    _add_model_options(report)
    _add_policy_options(report)
    report.add_argument("--format", choices=("text", "markdown", "json", "csv", "html"), default="text")
    report.set_defaults(run=_report)

    listing = commands.add_parser("layers", help="every layer a policy can name, with its shapes")
    _add_model_options(listing)
    listing.set_defaults(run=_layers)

    code = commands.add_parser("code", help="the generated code of the transformed model")
    _add_model_options(code)
    _add_policy_options(code)
    code.add_argument("--diff", action="store_true", help="only what the rewrite changed")
    code.set_defaults(run=_code)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="torchvision name, timm:NAME, hf:NAME (a directory, or a configuration's or model's class), "
        "package.module:factory, or saved file (.pt2; .pt with --unsafe-pickle)",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE]|JSON",
        help="8x3x224x224, 8x128:int64; repeat for several inputs; "
        """named ones as JSON, '{"input_ids": "8x128:int64"}' (default: the model's own)""",
    )
    parser.add_argument("--model-args", metavar="JSON", help="keyword arguments of the factory")
    parser.add_argument(
        "--weights", metavar="NAME|FILE", help="torchvision weights, .safetensors or .pth file"
    )
    parser.add_argument(
        "--frontend", choices=FRONTENDS, default="auto", help="how to get graphs (default: auto)"
    )
    parser.add_argument(
        "--leaf", action="append", default=[], metavar="NAME", help="keep this module as one call"
    )
    parser.add_argument(
        "--unsafe-pickle", action="store_true", help="load a pickled model; runs code from the file"
    )
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="default: standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep", help=f"share of the gradient to keep, 0 < keep <= 1 (default {_DEFAULT_KEEP})"
    )
    parser.add_argument("--select", help=f"one of {', '.join(SELECTS)}")
    parser.add_argument("--score", help=f"one of {', '.join(score_names())}")
    parser.add_argument(
        "--policy", metavar="FILE", help=".toml or .json; the options above override its defaults"
    )


def _policy(args: argparse.Namespace) -> Policy:
    given: dict[str, Any] = {}
    if args.keep is not None:
        try:
            given["keep"] = float(args.keep)
        except ValueError as error:
            raise CommandError(f"--keep {args.keep}: expected a number with 0 < keep <= 1") from error
        given["k"] = None
    for option in ("select", "score"):
        if getattr(args, option) is not None:
            given[option] = getattr(args, option)
    policy = Policy(keep=_DEFAULT_KEEP) if args.policy is None else load_policy(args.policy)
    return replace(policy, **given)


def _source(args: argparse.Namespace) -> Source:
    return Source(args.model, args.weights, args.model_args, args.input, args.unsafe_pickle)


def _on_model(args: argparse.Namespace, use: Callable[..., Any]) -> Any:
    """`use(model, inputs, options...)`, with real data if the model turns out to read values."""
    source = _source(args)

    def run(loaded: Loaded) -> Any:
        return use(
            loaded.model,
            loaded.inputs or None,
            example_kwargs=loaded.kwargs,
            leaf_modules=args.leaf,
            frontend=args.frontend,
        )

    try:
        return run(load(source))
    except ValuesNeededError:
        return run(load(replace(source, real=True)))


def _report(args: argparse.Namespace) -> str:
    policy = _policy(args)
    report: Report = _on_model(
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
    sites = _on_model(args, layers)
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


def _code(args: argparse.Namespace) -> str:
    policy = _policy(args)
    transformed: Transformed = _on_model(
        args, lambda model, *rest, **options: transform(model, policy, *rest, **options)
    )
    return code_diff(transformed.module) if args.diff else generated_code(transformed.module)
