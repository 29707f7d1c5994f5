"""`fxprop calibrate`: the numbers of this machine for predictions, measured and written down."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate

from fxprop.cli.options import add_output_options, command, positive, shows_progress
from fxprop.policy.machine import USUAL, VARIABLE, machines_file
from fxprop.timing.calibrate import calibrate

_WHAT = {
    "entry": "an entry moved between memory and core",
    "convolution": "a FLOP of a convolution",
    "pointwise": "a FLOP of a 1x1 convolution",
    "depthwise": "a FLOP of a depthwise convolution",
}


def add_calibrate(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    parser = command(
        commands,
        "calibrate",
        "measure this CPU (seconds), so that predicted times are for it and not for the usual one",
        f"""
        fxprop calibrate
        fxprop calibrate --threads 1        # for training with one thread
        {VARIABLE}= fxprop report resnet50  # by the usual numbers all the same
        """,
        _calibrate,
    )
    parser.add_argument("--rounds", type=positive, default=5, help="timings of each part (default 5)")
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's choice)")
    add_output_options(parser)


def _calibrate(args: argparse.Namespace) -> str:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    here = calibrate(rounds=args.rounds, progress=shows_progress(args))
    rows = [(what, f"{getattr(here, of):.3g}", f"{getattr(USUAL, of):g}") for of, what in _WHAT.items()]
    file = machines_file()
    kept = f"Written to {file}" if file else f"Not kept, since {VARIABLE} is empty"
    return "\n".join(
        [
            here.name,
            "",
            tabulate(rows, ("in the time of one FLOP of a large product", "here", "usual")),
            "",
            kept,
            f"Predicted times and when='faster' go by what is kept for {torch.get_num_threads()} threads.",
        ]
    )
