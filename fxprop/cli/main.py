"""The command line: arguments in, text out. Everything else is done by the public functions."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from fxprop.cli.bench import add_bench
from fxprop.cli.calibrate import add_calibrate
from fxprop.cli.code import add_code
from fxprop.cli.completion import add_completion
from fxprop.cli.fidelity import add_fidelity
from fxprop.cli.options import shows_progress
from fxprop.cli.report import add_report
from fxprop.errors import CommandError, FxpropError
from fxprop.progress import show_progress
from fxprop.version import __version__

_EPILOG = """\
examples:
  fxprop report resnet50 --keep 0.05                    what it saves
  fxprop report resnet50 --format html -o report.html   the same as a page
  fxprop code resnet18 --keep 0.1 --diff                what changes in the code
  fxprop bench resnet50 --keep 0.25 0.1 0.05            what it saves in time
  fxprop calibrate                                      predict for this CPU
  fxprop COMMAND --help                                 options, more examples

exit codes: 0, 1 with one line on standard error, 2 for wrong usage
"""


_FIRST = """\
fxprop: make a PyTorch model's backward pass cost less, and see what it saves.

first, on a model of torchvision:
  fxprop report resnet50 --keep 0.05          what is saved, in FLOPs and time
  fxprop explain resnet50 conv1 --keep 0.05   one layer, and why
  fxprop bench resnet50 --keep 0.25 0.05      measured here (some minutes)

then on your own, made by a function make_net in mypackage/models.py:
  fxprop report mypackage.models:make_net --input 32x3x64x64

fxprop --help lists all commands; fxprop COMMAND --help options and examples.
In Python: gm, report = fxprop.transform(model, 0.25, (images,))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage (by argparse).

    Without arguments it shows what to do first.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(_FIRST, end="")
        return 0
    args = _parser().parse_args(argv)
    try:
        with show_progress(shows_progress(args)):
            output = args.run(args)
        _write(output, args.output)
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


def _write(output: str | bytes, file: str) -> None:
    if isinstance(output, str) and output and not output.endswith("\n"):
        output += "\n"
    if file == "-":
        _print(output)
        return
    try:
        Path(file).write_bytes(output.encode() if isinstance(output, str) else output)
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}") from error


def _print(output: str | bytes) -> None:
    if isinstance(output, str):
        sys.stdout.write(output)
    elif sys.stdout.isatty():
        raise CommandError("a picture cannot be shown on a terminal: give -o FILE, or redirect the output")
    else:
        sys.stdout.buffer.write(output)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxprop",
        description="Make a PyTorch model's backward pass cost less, and see what it saves.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fxprop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_report(commands)
    add_code(commands)
    add_bench(commands)
    add_calibrate(commands)
    add_fidelity(commands)
    add_completion(commands, parser)
    return parser
