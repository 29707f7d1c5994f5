"""Where the command line gets models from: torchvision names, package.module:factory, saved files.

Returns a model with example inputs. Builds on the meta device where no weights are asked for, so that
looking at a model costs no memory.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprop.cli.models.files import load_exported_program, load_pickled_module
from fxprop.cli.models.hubs import BATCH, hf_inputs, hf_model, nearest, timm_inputs, timm_model
from fxprop.errors import CommandError
from fxprop.pytree import tree_map

_PICKLES = (".pt", ".pth", ".pkl", ".pickle")

# the shortest clip that all of torchvision's video models take
_FRAMES = 16


@dataclass(frozen=True)
class Source:
    """What was asked for on the command line."""

    model: str
    weights: str | None = None
    # JSON text of keyword arguments for the factory
    model_args: str | None = None
    # "8x3x224x224" or "8x128:int64", one per positional input
    inputs: Sequence[str] = ()
    unsafe_pickle: bool = False
    # build with real weights and inputs, for a model that reads values
    real: bool = False

    @property
    def on_meta(self) -> bool:
        """Whether to build without data: no weights are asked for."""
        return self.weights is None and not self.real


@dataclass(frozen=True)
class Loaded:
    """A model and inputs that fit it."""

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load(source: Source) -> Loaded:
    """The model that `source` names, with example inputs on the meta device.

    >>> load(Source("resnet50")).inputs[0].shape
    torch.Size([8, 3, 224, 224])

    Raises CommandError, which names what is missing or unusable, and the nearest names.
    """
    suffix = Path(source.model).suffix
    if source.model.startswith("timm:"):
        loaded = _from_timm(source)
    elif source.model.startswith("hf:"):
        loaded = _from_transformers(source)
    elif suffix == ".pt2":
        loaded = _from_export(source)
    elif suffix in _PICKLES:
        loaded = _from_pickle(source)
    elif ":" in source.model:
        loaded = _from_factory(source)
    else:
        loaded = _from_torchvision(source)
    of_a_zoo = source.model.startswith(("timm:", "hf:")) or not (suffix or ":" in source.model)
    if source.real and source.weights is None and of_a_zoo:
        draw_zeros(loaded.model)
    if source.weights is not None and _is_weights_file(source.weights):
        _load_weights(loaded.model, Path(source.weights))
    if source.inputs:
        loaded = Loaded(loaded.model, *_given_inputs(source.inputs))
    if not loaded.inputs and not loaded.kwargs:
        raise CommandError(
            f"{source.model} needs --input with the shape of its input, such as --input 8x3x224x224 "
            "(repeat it for several inputs)"
        )
    return _with_data(loaded) if source.real else loaded


def _given_inputs(texts: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named inputs from the values of --input."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        if not text.lstrip().startswith("{"):
            args.append(parse_input(text))
            continue
        try:
            named = json.loads(text)
        except json.JSONDecodeError as error:
            raise CommandError(f"--input {text}: not valid JSON: {error}") from error
        kwargs |= {
            name: parse_input(value) if isinstance(value, str) else value for name, value in named.items()
        }
    return tuple(args), kwargs


def _with_data(loaded: Loaded) -> Loaded:
    """The same with random numbers in place of meta tensors: integers are 0 or 1, which any table has."""

    def real(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_meta:
            return value
        if value.is_floating_point():
            return torch.rand(value.shape, dtype=value.dtype)
        return torch.randint(2, value.shape).to(value.dtype)

    args, kwargs = tree_map(real, (tuple(loaded.inputs), dict(loaded.kwargs)))
    return Loaded(loaded.model, args, kwargs)


def draw_zeros(model: nn.Module) -> None:
    """Random numbers for matrices that are zero as built: behind them all gradients would be zero.

    Among zeros the largest entries are found in no time, and no speed of a training is measured.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)


def parse_input(text: str) -> torch.Tensor:
    """A meta tensor from "8x3x224x224" (float32) or "8x128:int64"."""
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", text)
    dtype = getattr(torch, (match[2] or "float32"), None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise CommandError(
            f"--input {text}: expected sizes joined by x, and a torch dtype if it is not float32: "
            "8x3x224x224 or 8x128:int64"
        )
    return torch.empty([int(size) for size in match[1].split("x")], dtype=dtype, device="meta")


# --- timm and transformers ------------------------------------------------------------------------------


def _from_timm(source: Source) -> Loaded:
    name = source.model.removeprefix("timm:")
    pretrained = source.weights == "DEFAULT"
    if source.weights and not pretrained and not _is_weights_file(source.weights):
        raise CommandError(f"--weights {source.weights}: expected DEFAULT, or a .safetensors or .pth file")
    make = timm_model(name, _model_args(source), pretrained=pretrained)
    model = _build(make, source.model, on_meta=source.on_meta)
    return Loaded(model, timm_inputs(model))


def _from_transformers(source: Source) -> Loaded:
    name = source.model.removeprefix("hf:")
    by_name = source.weights is not None and not _is_weights_file(source.weights)
    make = hf_model(name, _model_args(source), weights=by_name)
    model = _build(make, source.model, on_meta=source.on_meta and not Path(name).is_dir())
    # from_pretrained gives a model in eval mode
    model.train()
    return Loaded(model, (), {} if source.inputs else hf_inputs(model))


# --- torchvision --------------------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    """The models that torchvision has; none where it cannot be imported."""
    try:
        from torchvision import models
    except ImportError:
        return []
    names: list[str] = models.list_models()
    return names


def _from_torchvision(source: Source) -> Loaded:
    try:
        from torchvision import models
    except ImportError as error:
        raise CommandError(f"model names need torchvision, which cannot be imported: {error}") from error
    name = source.model
    known = models.list_models()
    if name not in known:
        raise CommandError(
            f"unknown model {name!r}: expected a torchvision name, timm:NAME, hf:NAME, "
            f"package.module:factory, or a saved file.{nearest(name, known)}"
        )
    weights_enum = models.get_model_weights(name)
    weights = source.weights if not _is_weights_file(source.weights) else None
    if weights is not None and weights != "DEFAULT" and weights not in weights_enum.__members__:
        raise CommandError(
            f"--weights {weights}: {name} has {', '.join(weights_enum.__members__) or 'no weights'}; "
            "or give a .safetensors or .pth file"
        )
    arguments = _model_args(source)
    arguments.setdefault("weights", weights)
    builder = models.get_model_builder(name)
    if "weights_backbone" in builder.__annotations__:
        arguments.setdefault("weights_backbone", None)
    if name in ("googlenet", "inception_v3") and weights is None:
        arguments.setdefault("init_weights", False)
    model = _build(lambda: builder(**arguments), name, on_meta=source.on_meta)
    if "weights_backbone" in builder.__annotations__ and name in models.list_models(models.detection):
        return Loaded(model, _detection_inputs(name))
    count = 2 if name in models.list_models(models.optical_flow) else 1
    shape = _torchvision_shape(weights_enum)
    return Loaded(model, tuple(torch.empty(shape, device="meta") for _ in range(count)))


def _detection_inputs(name: str) -> tuple[Any, ...]:
    """Images and targets, as a detection model takes them in training."""
    side, points = 320, 17
    target = {
        "boxes": torch.tensor([[32.0, 32.0, 256.0, 256.0]]),
        "labels": torch.ones(1, dtype=torch.int64),
    }
    if name.startswith("mask"):
        target["masks"] = torch.ones(1, side, side, dtype=torch.uint8)
    if name.startswith("keypoint"):
        target["keypoints"] = torch.full((1, points, 3), 64.0).index_fill_(2, torch.tensor([2]), 1.0)
    images = [torch.empty(3, side, side, device="meta") for _ in range(2)]
    return images, [dict(target) for _ in images]


def _torchvision_shape(weights_enum: Any) -> tuple[int, ...]:
    """The input shape of the model's own preprocessing."""
    entries = list(weights_enum)
    transform = entries[0].transforms() if entries else None
    size = getattr(transform, "crop_size", None) or getattr(transform, "resize_size", None) or 224
    sizes = [size] if isinstance(size, int) else list(size)
    height, width = (sizes * 2)[:2]
    is_video = type(transform).__name__ == "VideoClassification"
    frames = (_FRAMES,) if is_video else ()
    return (BATCH, 3, *frames, height, width)


# --- factories and files ------------------------------------------------------------------------------


def named_object(text: str) -> Any:
    """What `package.module:name` names; CommandError says what is missing."""
    path, _, name = text.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", path) or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise CommandError(f"{text}: expected package.module:factory")
    # a console script does not have the working directory on its path, `python -m` does
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(path)
    except Exception as error:
        raise CommandError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise CommandError(f"{path} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def _from_factory(source: Source) -> Loaded:
    factory = named_object(source.model)
    if isinstance(factory, nn.Module):
        return Loaded(factory, ())
    if not callable(factory):
        raise CommandError(f"{source.model} is a {type(factory).__name__}: expected a factory or a module")
    arguments = _model_args(source)
    model = _build(lambda: factory(**arguments), source.model, on_meta=source.on_meta)
    if not isinstance(model, nn.Module):
        raise CommandError(f"{source.model} returned a {type(model).__name__}: expected a torch.nn.Module")
    return Loaded(model, ())


def _build(make: Any, name: str, *, on_meta: bool) -> Any:
    if on_meta:
        try:
            with torch.device("meta"):
                return make()
        except Exception:
            # some constructors read values they have just computed, which meta tensors do not have;
            # a real fault shows again below
            pass
    try:
        return make()
    except Exception as error:
        raise CommandError(f"building {name} failed: {type(error).__name__}: {error}") from error


def _model_args(source: Source) -> dict[str, Any]:
    if source.model_args is None:
        return {}
    try:
        arguments = json.loads(source.model_args)
    except json.JSONDecodeError as error:
        raise CommandError(f"--model-args {source.model_args}: not valid JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise CommandError(f'--model-args {source.model_args}: expected an object, {{"name": value}}')
    return arguments


def _from_export(source: Source) -> Loaded:
    _check_file(source.model)
    program = load_exported_program(source.model, unsafe_pickle=source.unsafe_pickle)
    args, kwargs = program.example_inputs or ((), {})
    return Loaded(program.module(), tuple(args), kwargs)


def _from_pickle(source: Source) -> Loaded:
    _check_file(source.model)
    return Loaded(load_pickled_module(source.model, unsafe_pickle=source.unsafe_pickle), ())


# --- weights ------------------------------------------------------------------------------------------


def _is_weights_file(weights: str | None) -> bool:
    return weights is not None and Path(weights).suffix in (".safetensors", *_PICKLES)


def _load_weights(model: nn.Module, file: Path) -> None:
    _check_file(str(file))
    try:
        state = _read_weights(file)
    except CommandError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"{file} cannot be read as weights: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    try:
        model.load_state_dict(state)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{file} does not fit the model: {reason[:300]}") from error


def _read_weights(file: Path) -> Any:
    if file.suffix != ".safetensors":
        return torch.load(file, map_location="cpu", weights_only=True)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CommandError(f"{file} needs safetensors: pip install 'fxprop[safetensors]'") from error
    return load_file(file)


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise CommandError(f"{path}: no such file")
