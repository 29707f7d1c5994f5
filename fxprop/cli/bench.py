"""`fxprop bench`: arguments to `fxprop.measure`, and its answer to text, JSON and a picture."""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprop.cli.options import (
    add_model_options,
    add_policy_options,
    add_tune_options,
    command,
    complete_with,
    on_model,
    policies_of,
    positive,
    shows_progress,
)
from fxprop.errors import CommandError
from fxprop.policy.policy import Policy
from fxprop.pytree import tree_map
from fxprop.timing.measure import measure
from fxprop.timing.measurement import Measurement
from fxprop.timing.picture import plot

_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def add_bench(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    bench = command(
        commands,
        "bench",
        "time training steps, dense and transformed in turn: medians, and ratios with their quartiles",
        """
        fxprop bench resnet50 --keep 0.25 0.1 0.05
        fxprop bench resnet50 --examples 0.5 0.25 --keep 1 0.25
        fxprop bench resnet50 --preset fast --sites
        fxprop bench mobilenet_v3_large --tune --tune-cache tune.json
        fxprop bench resnet18 vit_b_16 --keep 0.5 0.25 0.1 0.05 --plot speed.svg
        fxprop bench resnet50 --device cuda --amp bfloat16 --channels-last --compile --input 256x3x224x224
        """,
        _bench,
    )
    add_model_options(bench, several=True)
    add_policy_options(bench, several=True)
    bench.add_argument("--rounds", type=positive, default=10, help="timed steps per variant (default 10)")
    bench.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    bench.add_argument("--threads", type=positive, help="of the CPU (default: torch's choice)")
    bench.add_argument("--amp", choices=tuple(_AMP), help="run under autocast")
    bench.add_argument("--channels-last", action="store_true", help="model and images in channels_last")
    bench.add_argument("--compile", action="store_true", help="run every variant through torch.compile")
    bench.add_argument("--sites", action="store_true", help="also time every rewritten layer alone")
    add_tune_options(bench, "leave dense every layer that measures no faster")
    bench.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    picture = bench.add_argument("--plot", metavar="FILE", help="backward time over keep, .svg or .png")
    complete_with(picture, "FILE")


def _bench(args: argparse.Namespace) -> str:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device {args.device}: torch sees no GPU here; use --device cpu")
    policies = policies_of(args)
    measurements = []
    for name in args.model:
        of_model = argparse.Namespace(**{**vars(args), "model": name})
        run = functools.partial(_measure, of_model, policies)
        measurements.append(on_model(of_model, run, real=True))
    if args.plot is not None:
        plot(dict(zip(args.model, measurements, strict=True)), args.plot)
    return _text(args, measurements)


def _measure(
    args: argparse.Namespace,
    policies: list[Policy],
    model: nn.Module,
    inputs: Any,
    example_kwargs: Any,
    **rest: Any,
) -> Measurement:
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    model.to(args.device).to(memory_format=layout)

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(args.device, memory_format=layout if value.dim() == 4 else torch.preserve_format)

    measurement = measure(
        model,
        policies,
        tree_map(place, inputs),
        example_kwargs=tree_map(place, example_kwargs),
        rounds=args.rounds,
        compile=args.compile,
        amp=_AMP.get(args.amp),
        sites=args.sites,
        tuned=args.tune,
        cache=args.tune_cache,
        progress=shows_progress(args),
        **rest,
    )
    return replace(measurement, model=args.model)


def _text(args: argparse.Namespace, measurements: list[Measurement]) -> str:
    if args.format == "json":
        data = [measurement.to_dict() for measurement in measurements]
        return json.dumps(data[0] if len(data) == 1 else data, indent=2)
    style = "github" if args.format == "markdown" else "simple"
    return "\n\n".join(measurement.render(style) for measurement in measurements)
