"""The options that several commands share, and what they stand for: a loaded model, a policy."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fxprop import settings
from fxprop.cli.models.sources import Source, load
from fxprop.errors import CommandError, ValuesNeededError
from fxprop.pipeline.arguments import FRONTENDS
from fxprop.policy.files import load_policy
from fxprop.policy.policy import Policy
from fxprop.progress import stage

Result = TypeVar("Result")

_DEFAULT_KEEP = 0.05
_PRESETS: dict[str, Callable[..., Policy]] = {"exact": Policy, "fast": Policy.fast}
# settings that are options of their own; --keep is one that may be given more than once
_OPTIONS = (*(s for s in settings.SETTINGS if s.name not in ("keep", "k")), *settings.OF_EXAMPLES)


# shell functions that `fxprop completion` defines
MODELS = {"bash": "_fxprop_models", "zsh": "_fxprop_models"}


def command(
    commands: Any, name: str, does: str, examples: str, run: Callable[[argparse.Namespace], Any]
) -> argparse.ArgumentParser:
    """A subcommand that `does` something, with examples, one per line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=textwrap.fill(f"{does[0].upper()}{does[1:]}.", 80),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip("\n"), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """MODEL and how to load it, and where the output goes."""
    model = parser.add_argument(
        "model",
        nargs="+" if several else None,
        metavar="MODEL",
        help="torchvision name, timm:NAME, hf:NAME (a directory, or a configuration's or model's class), "
        "package.module:factory, or saved file (.pt2; .pt with --unsafe-pickle)",
    )
    complete_with(model, MODELS)
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE]|JSON",
        help="8x3x224x224, 8x128:int64; repeat for several inputs; "
        """named ones as JSON, '{"input_ids": "8x128:int64"}' (default: the model's own)""",
    )
    parser.add_argument("--model-args", metavar="JSON", help="keyword arguments of the factory")
    weights = parser.add_argument(
        "--weights", metavar="NAME|FILE", help="torchvision weights, .safetensors or .pth file"
    )
    complete_with(weights, "FILE")
    parser.add_argument(
        "--frontend", choices=FRONTENDS, default="auto", help="how to get graphs (default: auto)"
    )
    parser.add_argument(
        "--leaf", action="append", default=[], metavar="NAME", help="keep this module as one call"
    )
    parser.add_argument(
        "--unsafe-pickle", action="store_true", help="load a pickled model; runs code from the file"
    )
    add_output_options(parser)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where the output goes, and what else is written."""
    output = parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="a file (default, and -: standard output)",
    )
    complete_with(output, "FILE")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def complete_with(action: argparse.Action, kind: Mapping[str, str] | str) -> None:
    """Say what a shell completes an argument with: "FILE", "DIRECTORY", or a function of each shell.

    `fxprop.cli.completion` hands it to shtab.
    """
    action.complete = kind  # type: ignore[attr-defined]


def positive(text: str) -> int:
    """An option's value: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def add_policy_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """What to keep; with `several`, --keep and --examples take more than one number."""
    parser.add_argument(
        "--keep",
        nargs="+" if several else None,
        help=f"share of the gradient to keep, 0 < keep <= 1 (default {_DEFAULT_KEEP}; 1 with --examples)",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(_PRESETS),
        help="fast: scores from part of the batch, bias and norm gradients in part (an approximation)",
    )
    for setting in _OPTIONS:
        takes: dict[str, Any] = {"type": setting.read, "metavar": "VALUE"}
        if isinstance(setting.default, bool):
            takes = {"action": argparse.BooleanOptionalAction}
        if setting.name == "examples" and several:
            takes["nargs"] = "+"
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}", default=None, help=_help(setting), **takes
        )
    file = parser.add_argument(
        "--policy", metavar="FILE", help=".toml or .json; the options above override its defaults"
    )
    complete_with(file, "FILE")


def _help(setting: settings.Setting) -> str:
    """The table's text, without the links that only the guide can follow."""
    meaning = re.sub(r" \(\[.*?\]\(.*?\)\)", "", setting.meaning).replace("`", "")
    return f"{meaning} ({setting.values}; default {setting.default})".replace("%", "%%")


def add_tune_options(parser: argparse.ArgumentParser, does: str) -> None:
    """--tune, which `does` something, and where its timings are kept."""
    parser.add_argument("--tune", action="store_true", help=does)
    cache = parser.add_argument(
        "--tune-cache", metavar="FILE", help="JSON file to keep the timings of --tune in"
    )
    complete_with(cache, "FILE")


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether progress can be seen, and was not switched off."""
    return not args.quiet and sys.stderr.isatty()


def policies_of(args: argparse.Namespace) -> list[Policy]:
    """The policies of options that may be given more than once, each --examples with each --keep."""
    return [
        policy_of(argparse.Namespace(**{**vars(args), "keep": keep, "examples": examples}))
        for examples in args.examples or (None,)
        for keep in args.keep or (None,)
    ]


def policy_of(args: argparse.Namespace) -> Policy:
    """The policy that the options say."""
    given: dict[str, Any] = {}
    if args.keep is not None:
        try:
            # in place of all that a file says of how much is kept
            given = {**dict.fromkeys(settings.AMOUNTS), "keep": float(args.keep)}
        except ValueError as error:
            raise CommandError(f"--keep {args.keep}: expected a number with 0 < keep <= 1") from error
    for setting in _OPTIONS:
        if getattr(args, setting.name) is not None:
            given[setting.name] = getattr(args, setting.name)
    if args.policy is not None and args.preset is not None:
        raise CommandError(
            "--policy and --preset given: a policy file has its own settings; give one of them"
        )
    if args.policy is not None:
        policy = load_policy(args.policy)
    else:
        alone = args.examples is not None and args.preset is None
        policy = _PRESETS[args.preset or "exact"](keep=1.0 if alone else _DEFAULT_KEEP)
    return replace(policy, **given)


def by_policy(args: argparse.Namespace, function: Callable[..., Result], real: bool = False) -> Result:
    """What `function`, such as `transform`, makes of the model by the policy that the options say."""
    policy = policy_of(args)
    return on_model(args, lambda model, *rest, **options: function(model, policy, *rest, **options), real)


def on_model(args: argparse.Namespace, use: Callable[..., Result], real: bool = False) -> Result:
    """`use(model, inputs, options...)`, with real data if asked to or if the model reads values."""
    source = Source(args.model, args.weights, args.model_args, args.input, args.unsafe_pickle, real)

    def run(source: Source) -> Result:
        with stage(f"building {source.model}"):
            loaded = load(source)
        return use(
            loaded.model,
            loaded.inputs or None,
            example_kwargs=loaded.kwargs,
            leaf_modules=args.leaf,
            frontend=args.frontend,
        )

    try:
        return run(source)
    except ValuesNeededError:
        return run(replace(source, real=True))
