"""Models by name from timm and transformers: built from their configurations, with inputs that fit them.

Nothing is downloaded unless weights are asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprop.errors import CommandError

BATCH = 8
_TOKENS = 128
_SECONDS_OF_AUDIO = 1
_SAMPLE_RATE = 16000


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CommandError(f"this model needs {name}: pip install 'fxprop[{name}]'") from error


def _unknown_name(kind: str, name: str, known: list[str]) -> CommandError:
    return CommandError(f"unknown {kind} {name!r}.{nearest(name, known)}")


def nearest(name: str, known: list[str]) -> str:
    """A sentence with the names most like `name`, behind a space; empty where none is."""
    near = difflib.get_close_matches(name, known, n=3)
    return f" Nearest: {', '.join(near)}." if near else ""


def timm_model(name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> Callable[[], nn.Module]:
    """How to build a timm model."""
    timm = _library("timm")
    if not timm.is_model(name):
        raise _unknown_name("timm model", name, timm.list_models())
    return lambda: timm.create_model(name, pretrained=pretrained, **arguments)


def timm_inputs(model: nn.Module) -> tuple[torch.Tensor]:
    """Images of the size that a timm model is configured for."""
    config: Any = model.default_cfg
    return (torch.empty(BATCH, *config["input_size"], device="meta"),)


def hf_model(name: str, arguments: Mapping[str, Any], *, weights: bool) -> Callable[[], nn.Module]:
    """How to build a transformers model: from a directory, or a configuration's or a model's class name."""
    transformers = _library("transformers")
    if Path(name).is_dir():
        return _from_directory(transformers, name, arguments)
    named: Any = getattr(transformers, name, None)
    if weights:
        raise CommandError(f"hf:{name}: give the directory that holds the weights instead of --weights")
    if not inspect.isclass(named):
        raise _unknown_name("transformers configuration or model class", name, dir(transformers))
    made: Any = named
    if issubclass(named, transformers.PreTrainedConfig):
        config = made(**arguments)
        return lambda: _of_config(transformers, config)
    if issubclass(named, transformers.PreTrainedModel) and made.config_class is not None:
        config = made.config_class(**arguments)
        return lambda: made(config)
    raise CommandError(f"hf:{name} is neither a configuration nor a model class of transformers")


def _from_directory(transformers: Any, path: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, **arguments)
    except Exception as error:
        raise CommandError(f"{path} holds no configuration of transformers: {error}") from error
    files = [*Path(path).glob("*.safetensors"), *Path(path).glob("*.safetensors.index.json")]
    if not files:
        return lambda: _of_config(transformers, config)
    model_class = _class_of(transformers, config)
    # safetensors alone: other weight files are pickles
    return lambda: model_class.from_pretrained(
        path, config=config, local_files_only=True, use_safetensors=True
    )


def _class_of(transformers: Any, config: Any) -> Any:
    names = config.architectures or []
    return getattr(transformers, names[0]) if names else transformers.AutoModel


def _of_config(transformers: Any, config: Any) -> Any:
    model_class = _class_of(transformers, config)
    return (model_class.from_config if model_class is transformers.AutoModel else model_class)(config)


def hf_inputs(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Keyword inputs for a transformers model, by the names its forward takes and its configuration."""
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    text, vision = (getattr(config, part, None) or config for part in ("text_config", "vision_config"))
    tokens = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "input_ids": lambda: _ids(tokens),
        "pixel_values": lambda: _pixels(vision),
        "input_features": lambda: _features(config),
        "input_values": lambda: torch.empty(BATCH, _SAMPLE_RATE * _SECONDS_OF_AUDIO, device="meta"),
    }
    main = getattr(model, "main_input_name", "input_ids")
    wanted = [main]
    if vision is not config and text is not config:
        wanted += [name for name in ("input_ids", "pixel_values") if name in takes and name != main]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        wanted.append("decoder_input_ids")
        makers["decoder_input_ids"] = lambda: _ids(tokens)
    missing = [name for name in wanted if name not in makers]
    if missing:
        raise CommandError(
            f"{type(model).__name__} takes {', '.join(missing)}, whose shape is not known: give it with "
            '--input \'{"name": "8x128:int64"}\''
        )
    return {name: makers[name]() for name in wanted}


def _ids(tokens: int) -> torch.Tensor:
    return torch.empty(BATCH, tokens, dtype=torch.int64, device="meta")


def _pixels(config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.empty(BATCH, getattr(config, "num_channels", 3), height, width, device="meta")


def _features(config: Any) -> torch.Tensor:
    # Whisper halves the length on the way in
    length = 2 * getattr(config, "max_source_positions", 1500)
    return torch.empty(BATCH, getattr(config, "num_mel_bins", 80), length, device="meta")
