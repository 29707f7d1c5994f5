"""The options that several commands share, and what they stand for: a loaded model, a policy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fxprop.checks import FRONTENDS
from fxprop.errors import CommandError, ValuesNeededError
from fxprop.model_sources import Loaded, Source, load
from fxprop.ops.select import score_names
from fxprop.plan import SELECTS, WEIGHT_GRADS, WHENS
from fxprop.policy import Policy
from fxprop.policy_files import load_policy

_DEFAULT_KEEP = 0.05
_PRESETS: dict[str, Callable[..., Policy]] = {"exact": Policy, "fast": Policy.fast}


def add_model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """MODEL and how to load it, and where the output goes."""
    parser.add_argument(
        "model",
        nargs="+" if several else None,
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


def add_policy_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """What to keep; with `several`, --keep takes more than one number."""
    parser.add_argument(
        "--keep",
        nargs="+" if several else None,
        help=f"share of the gradient to keep, 0 < keep <= 1 (default {_DEFAULT_KEEP})",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(_PRESETS),
        help="fast: scores from part of the batch, bias and norm gradients in part (an approximation)",
    )
    parser.add_argument(
        "--when", choices=WHENS, help="faster (default): leave dense what is predicted not to win"
    )
    parser.add_argument(
        "--weight-grad",
        choices=WEIGHT_GRADS,
        help="row_sparse: sparse tensors, for SGD without momentum, SparseAdam and Adagrad",
    )
    parser.add_argument("--select", help=f"one of {', '.join(SELECTS)}")
    parser.add_argument("--score", help=f"one of {', '.join(score_names())}")
    parser.add_argument(
        "--policy", metavar="FILE", help=".toml or .json; the options above override its defaults"
    )


def policy_of(args: argparse.Namespace, keep: str | None = None) -> Policy:
    """The policy that the options say; `keep` in place of --keep."""
    given: dict[str, Any] = {}
    keep = args.keep if keep is None else keep
    if keep is not None:
        try:
            given["keep"] = float(keep)
        except ValueError as error:
            raise CommandError(f"--keep {keep}: expected a number with 0 < keep <= 1") from error
        given["k"] = None
    for option in ("select", "score", "when", "weight_grad"):
        if getattr(args, option) is not None:
            given[option] = getattr(args, option)
    if args.policy is not None and args.preset is not None:
        raise CommandError(
            "--policy and --preset given: a policy file has its own settings; give one of them"
        )
    if args.policy is not None:
        policy = load_policy(args.policy)
    else:
        policy = _PRESETS[args.preset or "exact"](keep=_DEFAULT_KEEP)
    return replace(policy, **given)


def _source(args: argparse.Namespace) -> Source:
    return Source(args.model, args.weights, args.model_args, args.input, args.unsafe_pickle)


def on_model(args: argparse.Namespace, use: Callable[..., Any], real: bool = False) -> Any:
    """`use(model, inputs, options...)`, with real data if asked to or if the model reads values."""
    source = replace(_source(args), real=real)

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
