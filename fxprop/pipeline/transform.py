"""The public functions: transform, estimate, layers, restore, and the order of stages that they share.

model -> (tracing) graphs and shapes -> (graph) sites -> (policy) plan -> (graph) new graphs -> report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fxprop.compact.install import uninstall
from fxprop.errors import InputError
from fxprop.graph.find_sites import find_sites, with_positions_of
from fxprop.graph.rewrite import rewrite_model
from fxprop.graph.sparse_code import SparseCode
from fxprop.graph.verify import verify_state
from fxprop.pipeline.arguments import (
    ExampleInputs,
    check_frontend,
    check_inputs,
    check_model,
    check_needs_no_shapes,
    check_not_rewritten,
)
from fxprop.pipeline.examined import examined
from fxprop.pipeline.put_in_force import take_examples
from fxprop.pipeline.recipe import Recipe, attach, detach, recipe_of
from fxprop.plan.decisions import Plan
from fxprop.plan.sites import Site
from fxprop.policy.files import PolicyLike, as_policy
from fxprop.policy.policy import Policy
from fxprop.progress import stage
from fxprop.report.report import Report
from fxprop.tracing.compiled_parts import compiled_in
from fxprop.tracing.module.copy_tree import copy_tree
from fxprop.tracing.module.stored import copy_graphs
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.observe.records import Run
from fxprop.tracing.observe.run import run_traced
from fxprop.tracing.observe.untouched import collecting
from fxprop.tracing.parts import trace_model
from fxprop.tracing.reach import methods_beside_forward
from fxprop.tracing.traced import Traced
from fxprop.tracing.tracer import LeafModules

Frontend = Literal["auto", "symbolic", "submodules", "export"]


class Transformed(NamedTuple):
    """What `transform` returns: the module to train, and the report on what it saves."""

    module: nn.Module
    report: Report


def transform(
    model: nn.Module | torch.export.ExportedProgram,
    policy: PolicyLike,
    example_inputs: ExampleInputs = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    frontend: Frontend = "auto",
    leaf_modules: LeafModules = (),
    preserve_modules: LeafModules = (),
) -> Transformed:
    """Rewrite a model so that its backward pass uses only part of each layer's output gradient.

    >>> model = torchvision.models.resnet50()
    >>> gm, report = fxprop.transform(model, 0.05, (torch.empty(8, 3, 224, 224),))
    >>> print(report); print(gm.code)
    >>> gm(images).sum().backward()

    Args:
        model: any nn.Module, a GraphModule, or an ExportedProgram. It is not changed.
        policy: a Policy, one keep ratio for all layers, a mapping, or the path of a .toml or .json file.
        example_inputs: the model's positional inputs, real, fake or on the meta device; only shapes,
            dtypes and requires_grad are used, unless the model reads values. Without them FLOPs are not
            counted, and the graph is not compared with what the model does.
        example_kwargs: keyword inputs.
        frontend: how to get graphs. "symbolic": the whole model by torch.fx. "submodules": the largest
            parts of it that torch.fx can trace, down to single layers; needs example inputs. "export":
            the whole model as aten operators, by torch.export. "auto": symbolic if possible, otherwise
            submodules.
        leaf_modules: module classes or qualified names to keep as one call (their layers stay dense).
        preserve_modules: module classes, or globs on qualified names, that stay modules and are still
            called, each with a graph of its own: for hooks, fully_shard and activation checkpointing,
            block by block. Modules that already have hooks are always preserved.

    Returns:
        (module, report). The module's output is bit-equal to the model's in train and eval mode; it
        holds the same Parameter and buffer objects under the same state_dict keys in the same order.
        Traced whole it is a GraphModule; otherwise it is of the model's own class, with GraphModules
        inside.

    Raises:
        ModelError, InputError, TraceError, PolicyError: see their messages. The model stays as it was.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    stages = _Stages.run(
        model, policy, example_inputs, example_kwargs, frontend, leaf_modules, preserve_modules
    )
    with stage("rewriting"), collecting(False):
        rewritten = stages.rewritten(model)
    recipe = stages.examined(rewritten)
    attach(rewritten, recipe)
    take_examples(rewritten, recipe)
    return Transformed(rewritten, recipe.report(stages.traced.training))


def estimate(
    model: nn.Module | torch.export.ExportedProgram,
    policy: PolicyLike,
    example_inputs: ExampleInputs,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    frontend: Frontend = "auto",
    leaf_modules: LeafModules = (),
    preserve_modules: LeafModules = (),
) -> Report:
    """The report that `transform` would return, without making the module.

    >>> with torch.device("meta"):
    ...     model = torchvision.models.vit_b_16()
    >>> print(fxprop.estimate(model, 0.05, (torch.empty(8, 3, 224, 224, device="meta"),)))

    Arguments and errors as in `transform`. Needs no weights: a model on the meta device takes seconds
    and no memory, whatever its size.
    """
    stages = _Stages.run(
        model, policy, example_inputs, example_kwargs, frontend, leaf_modules, preserve_modules
    )
    return stages.examined(model).report(stages.traced.training)


def layers(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: ExampleInputs = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    frontend: Frontend = "auto",
    leaf_modules: LeafModules = (),
    preserve_modules: LeafModules = (),
) -> tuple[Site, ...]:
    """Every layer that a policy can name, in graph order, for the mode the model is in.

    >>> for site in fxprop.layers(model, (x,)):
    ...     print(site.name, site.op, site.weight_shape, site.n("channel"), site.skip)

    Arguments and errors as in `transform`.
    """
    dense = Policy()
    stages = _Stages.run(
        model, dense, example_inputs, example_kwargs, frontend, leaf_modules, preserve_modules
    )
    return stages.sites()


def restore(gm: nn.Module) -> nn.Module:
    """The model before the rewrite, with the parameters as they are now.

    >>> dense = fxprop.restore(gm)
    >>> dense.fc.weight is gm.fc.weight
    True

    `gm` is not changed. Raises ModelError for a module that `transform` did not return.
    """
    recipe_of(gm)
    dense = copy_tree(gm)
    for module in list(dense.modules()):
        if isinstance(module, SparseCode):
            module.fx_uninstall()
        elif isinstance(module, TracedModule):
            module.fx_show_version((), copy_graphs(module.fx_graphs_before))
    uninstall(dense)
    for module in dense.modules():
        if isinstance(module, TracedModule):
            module.fx_arm()
    detach(dense)
    return dense


@dataclass(frozen=True)
class _Stages:
    """The stages up to the plan, for each mode that has a graph of its own."""

    traced: Traced
    recipe: Recipe
    # example inputs, positional and by keyword
    given: tuple[tuple[Any, ...], Mapping[str, Any]] | None

    @classmethod
    def run(
        cls,
        model: nn.Module | torch.export.ExportedProgram,
        policy: PolicyLike,
        example_inputs: ExampleInputs,
        example_kwargs: Mapping[str, Any] | None,
        frontend: str,
        leaf_modules: LeafModules,
        preserve_modules: LeafModules,
    ) -> _Stages:
        resolved = as_policy(policy)
        if isinstance(model, torch.export.ExportedProgram):
            model = model.module()
        check_model(model)
        check_frontend(frontend)
        check_not_rewritten(model)
        args, kwargs = check_inputs(example_inputs, example_kwargs)
        has_inputs = example_inputs is not None or bool(example_kwargs)
        given = (args, kwargs) if has_inputs else None
        with stage("tracing"), collecting(False):
            traced = trace_model(model, frontend, given, leaf_modules, preserve_modules)

        runs: dict[bool, Run | None] = {}
        sites: dict[bool, tuple[Site, ...]] = {}
        here = traced.training
        for mode in (here, not here) if traced.other_mode_differs else (here,):
            with stage("running the model for shapes"), collecting(False):
                runs[mode] = _run(traced, mode, args, kwargs) if has_inputs else None
            sites[mode] = find_sites(traced, mode, runs[mode])
        if has_inputs and runs.get(not here, runs[here]) is None:
            sites[not here] = with_positions_of(sites[here], sites[not here])
        resolved.check_all_match([site for of_mode in sites.values() for site in of_mode])
        plans = {mode: resolved.resolve(of_mode) for mode, of_mode in sites.items()}
        if not has_inputs:
            check_needs_no_shapes(plans)
        recipe = Recipe(
            resolved,
            resolved,
            plans,
            {mode: None if run is None else run.backward_flops for mode, run in runs.items()},
            model=type(model).__name__,
            frontend=traced.frontend,
            note=" ".join(_notes(model, here, runs, plans[here])),
            untraced=traced.untraced,
        )
        return cls(traced, recipe, given)

    def sites(self) -> tuple[Site, ...]:
        return tuple(d.site for d in self.recipe.plans[self.traced.training].decisions)

    def examined(self, module: nn.Module | torch.export.ExportedProgram) -> Recipe:
        """The recipe, which says whether the backward of `module` can take some of the examples."""
        if not self.recipe.in_force.takes_examples or self.given is None:
            return self.recipe
        if isinstance(module, torch.export.ExportedProgram):
            module = module.module()
        with stage("looking for the cut between examples"), collecting(False):
            return replace(self.recipe, examined=examined(module, *self.given))

    def rewritten(self, model: nn.Module) -> nn.Module:
        root, pieces = self.traced.root, self.traced.pieces
        graphs = [site.graph.split(".") for site in self.recipe.sites if site.skip is None]
        above = {".".join(parts[:depth]) for parts in graphs for depth in range(1, len(parts) + 1)}
        for path in list(pieces):
            if path and path not in above:
                pieces.pop(path).fx_uninstall()  # no policy can change it: it stays the module that it was
        rewrite_model(root, pieces, self.recipe.plans)
        attach(root, self.recipe)
        verify_state(model, root)
        return root


def _notes(model: nn.Module, here: bool, runs: Mapping[bool, Run | None], plan: Plan) -> Iterator[str]:
    if len(runs) > 1:
        other = "eval" if here else "train"
        yield f"The model's code differs in {other} mode, whose graph was rewritten by the same policy."
    run = runs[here]
    if run is None:
        yield (
            "There were no example inputs: FLOPs are not counted, and the graph was not compared with what "
            "the model does."
        )
    elif run.real:
        yield (
            "The model reads values: shapes and FLOPs are those of one run on the example inputs, and "
            "other inputs may take other paths through it."
        )
    if compiled := compiled_in(model):
        names = ", ".join(name or "the model itself" for name in compiled[:3])
        yield f"These were compiled and in the result are not: {names}. Compile the result again."
    methods, rewritten = methods_beside_forward(model), plan.rewritten
    if methods and rewritten:
        alone = [d.site for d in rewritten if d.site.call and d.site.call.weight.attribute is not None]
        work = sum(d.site.multiply_adds or 0 for d in rewritten)
        share = sum(site.multiply_adds or 0 for site in alone) / work if work else 1.0
        names = ", ".join(f"{name}()" for name in methods[:3])
        yield (
            f"The saving is for calls of forward. Where {names} call layers directly, {len(alone)} of the "
            f"{len(rewritten)} rewritten layers ({share:.0%} of their FLOPs) are sparse too, each by "
            "itself."
        )


def _run(traced: Traced, mode: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run | None:
    """The run in `mode`; None if only the mode the model is not in fails (a batch of 1, in training)."""
    try:
        return run_traced(traced, mode, args, kwargs)
    except InputError:
        if mode == traced.training:
            raise
        return None
