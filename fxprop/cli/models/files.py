"""Models from files: exported programs and pickles.

A file can run code of its author only with --unsafe-pickle.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath

import torch
from torch import nn

from fxprop.errors import CommandError


def load_exported_program(path: str, *, unsafe_pickle: bool) -> torch.export.ExportedProgram:
    """What `torch.export.save` wrote to `path`.

    >>> load_exported_program("model.pt2", unsafe_pickle=False).module()

    torch.export.load unpickles what tensors alone do not need. Without `unsafe_pickle` an archive with
    objects in it is refused, and everything else is read as tensors. Raises CommandError.
    """
    try:
        objects = [] if unsafe_pickle else _objects_in(path)
        if not objects:
            with contextlib.nullcontext() if unsafe_pickle else _tensors_only():
                return torch.export.load(path)
    except Exception as error:
        raise CommandError(f"{path} cannot be read as an exported program: {error}") from error
    raise CommandError(
        f"{path} holds objects besides tensors ({', '.join(objects[:3])}), and loading them "
        "runs any code its author put there; if you trust it, add --unsafe-pickle"
    )


def _objects_in(path: str) -> list[str]:
    """The members of an archive that torch.export.load would unpickle, or run."""
    members = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            member = PurePosixPath(name)
            constant = "constants" in member.parts and member.suffix != ".json"
            if (constant and not member.name.startswith("tensor_")) or "aotinductor" in member.parts:
                members.append(name)
    return members


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Where torch.load reads nothing but tensors, whatever its caller asks for."""
    # the only documented way to overrule a caller that passes weights_only=False
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load_pickled_module(path: str, *, unsafe_pickle: bool) -> nn.Module:
    """The module that `torch.save` wrote to `path`. Raises CommandError, also without `unsafe_pickle`."""
    if not unsafe_pickle:
        raise CommandError(
            f"{path} is a pickle, and loading one runs any code its author put there; if you trust "
            "it, add --unsafe-pickle (for weights alone, name the model and give --weights FILE)"
        )
    try:
        model = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CommandError(f"{path} cannot be loaded: {error}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"{path} holds a {type(model).__name__}, not a module; "
            "for a state dict name the model and give --weights FILE"
        )
    return model
