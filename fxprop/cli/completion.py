"""`fxprop completion`: a script that completes commands, options, files and model names in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fxprop.cli.models.sources import torchvision_names
from fxprop.cli.options import MODELS, add_output_options, command
from fxprop.errors import CommandError

_SHELLS = ("bash", "zsh")


def add_completion(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add the command to the subcommands of `parser`."""
    completion = command(
        commands,
        "completion",
        "print a script that completes fxprop's command line in bash or zsh",
        """
        eval "$(fxprop completion bash)"             # in this shell
        fxprop completion bash -o ~/.local/share/bash-completion/completions/fxprop
        fxprop completion zsh -o ~/.zfunc/_fxprop    # a folder in fpath
        """,
        lambda args: script(parser, args.shell),
    )
    completion.add_argument("shell", choices=_SHELLS)
    add_output_options(completion)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one shell, with torchvision's model names as they are now."""
    names = " ".join(torchvision_names())
    models = {
        "bash": f'{MODELS["bash"]}() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"{MODELS['zsh']}() {{ compadd {names}; _files; }}",
    }
    try:
        import shtab  # nothing else needs it
    except ImportError as error:
        raise CommandError("completion needs shtab, which is not installed: pip install shtab") from error
    _name_kinds(parser, {"FILE": shtab.FILE, "DIRECTORY": shtab.DIRECTORY})
    return str(shtab.complete(parser, shell, preamble=models[shell]))


def _name_kinds(parser: argparse.ArgumentParser, kinds: Mapping[str, Any]) -> None:
    """What `complete_with` said by name, as shtab wants it."""
    for action in parser._actions:
        kind = getattr(action, "complete", None)
        if isinstance(kind, str):
            action.complete = kinds[kind]  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _name_kinds(inner, kinds)
