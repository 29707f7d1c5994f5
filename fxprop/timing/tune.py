"""A measured choice per site: dense where the sparse backward does not win on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprop.errors import InputError
from fxprop.pipeline.arguments import ExampleInputs
from fxprop.pipeline.put_in_force import put_in_force, unwrap
from fxprop.pipeline.recipe import attach, recipe_of
from fxprop.pipeline.transform import layers, restore
from fxprop.plan.decisions import Sparsity, Timing
from fxprop.plan.sites import Site
from fxprop.progress import count
from fxprop.pytree import tree_leaves
from fxprop.report.report import Report
from fxprop.timing.layer_times import Conditions, SiteTimes, can_time, key, time_site


def tune(
    gm: nn.Module,
    example_inputs: ExampleInputs = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    margin: float = 0.05,
    rounds: int = 5,
    cache: str | os.PathLike[str] | None = None,
    names: Collection[str] | None = None,
    progress: bool = False,
) -> Report:
    """Time every rewritten layer's backward, dense and sparse, and leave dense what does not win.

    >>> gm, _ = fxprop.transform(model, fxprop.Policy(keep=0.05, when="always"), (x,))
    >>> print(fxprop.tune(gm, (x,), cache="tune.json"))

    Args:
        gm: what `fxprop.transform` returned; changed in place, nothing is traced for `gm` itself.
        example_inputs, example_kwargs: inputs of the size, dtype and memory format to be trained with.
            Without them the shapes are those of the transform.
        margin: a sparse backward must take less than 1 - margin of the dense one's time.
        rounds: timings per layer and side, of which the medians are compared.
        cache: a JSON file; what it holds for the same shapes, dtype, device, threads and k is not timed
            again, and what is timed is added.
        names: the layers to time; the others stay as planned. Default: all.
        progress: show a progress bar on standard error.

    Layers are timed alone, on random tensors; a region with its batch-norm and ReLU. A layer that loses is
    dense in the report, with the times as the reason, and stays so for that k when `set_keep` comes back
    to it. What cannot be timed (unknown shapes, tensors among its constants) is left as planned.
    Returns the report on the new plan. Raises ModelError for another module, InputError for a cache that
    cannot be read.
    """
    inner = unwrap(gm)
    recipe = recipe_of(inner)
    shapes: dict[str, Site] = {}
    if example_inputs is not None or example_kwargs:
        sites = layers(restore(inner), example_inputs, example_kwargs=example_kwargs)
        shapes = {site.name: site for site in sites}
    known = _read(cache)
    conditions = conditions_of(inner, example_inputs)
    measured = dict(recipe.measured)
    rewritten = {
        (d.site.name, d.sparsity): d for plan in recipe.plans.values() for d in plan.rewritten if d.sparsity
    }
    for decision in count(rewritten.values(), "tuning", progress, "layer"):
        site = decision.site
        if (other := shapes.get(site.name)) is not None:
            site = replace(site, input_shape=other.input_shape, output_shape=other.output_shape)
        assert decision.sparsity is not None
        sparsity = decision.sparsity.alone
        if not can_time(site) or (names is not None and site.name not in names):
            continue
        known_as = key(site, sparsity, conditions)
        if known_as not in known:
            known[known_as] = time_site(site, sparsity, conditions, rounds)
        dense, sparse = known[known_as]
        wins = sparse < (1 - margin) * dense
        measured[site.name, sparsity] = Timing(dense, sparse, conditions.device.type, wins)
    _write(cache, known)
    recipe = replace(recipe, measured=measured)
    attach(inner, recipe)
    return put_in_force(inner, recipe, recipe.policy)


def conditions_of(model: nn.Module, example_inputs: ExampleInputs) -> Conditions:
    """Where and in what form the model computes: by its parameters, and its first image."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    leaves = tree_leaves(example_inputs)
    images = (t for t in leaves if isinstance(t, torch.Tensor) and t.dim() == 4)
    image = next(images, torch.empty(0))
    last = not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)
    return Conditions(parameter.device, parameter.dtype, last)


def _read(cache: str | os.PathLike[str] | None) -> dict[str, SiteTimes]:
    if cache is None or not Path(cache).exists():
        return {}
    try:
        data = json.loads(Path(cache).read_text(encoding="utf-8"))
        return {known_as: SiteTimes(*map(float, times)) for known_as, times in data.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"cache {os.fspath(cache)!r} cannot be read ({error}): expected a JSON file that fxprop.tune "
            "wrote; delete it, or name another"
        ) from error


def _write(cache: str | os.PathLike[str] | None, known: Mapping[str, SiteTimes]) -> None:
    if cache is not None:
        Path(cache).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def site_times(
    gm: nn.Module, example_inputs: ExampleInputs, rounds: int, progress: bool = False
) -> list[tuple[Site, Sparsity, SiteTimes]]:
    """The times of every rewritten site of a transformed module that can be timed, in graph order."""
    inner = unwrap(gm)
    recipe = recipe_of(inner)
    conditions = conditions_of(inner, example_inputs)
    known: dict[str, SiteTimes] = {}
    timed = []
    rewritten = recipe.plans[recipe.mode(inner.training)].rewritten
    for decision in count(rewritten, "layers", progress, "layer"):
        site, sparsity = decision.site, decision.sparsity
        assert sparsity is not None
        if can_time(site):
            known_as = key(site, sparsity, conditions)
            if known_as not in known:
                known[known_as] = time_site(site, sparsity, conditions, rounds)
            timed.append((site, sparsity, known[known_as]))
    return timed
