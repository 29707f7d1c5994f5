"""Looking at a rewrite: the generated code before and after, layer by layer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn

from fxprop.errors import ExamplesError
from fxprop.graph.rewrite import made_for
from fxprop.ops.selections import SELECTIONS
from fxprop.pipeline.recipe import Recipe, recipe_of
from fxprop.plan.decisions import Decision
from fxprop.progress import stage
from fxprop.tracing.module.traced_module import TracedModule

_ASSIGNED = re.compile(r"\s*(\w+)\b[^=]*=")


@dataclass(frozen=True)
class Change:
    """Neighbouring lines of generated code that one layer's rewrite changed."""

    # the layer; None where a line only frees a value earlier or later than before
    decision: Decision | None
    # how many lines stand before these, in the code before and after
    skipped: tuple[int, int]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As a hunk of a unified diff without context."""
        lines = [f"-{line}" for line in self.before] + [f"+{line}" for line in self.after]
        sizes = (len(self.before), len(self.after))
        # the position of no lines is that of the line before them (POSIX diff)
        old, new = (
            f"{skipped + (size > 0)},{size}" for skipped, size in zip(self.skipped, sizes, strict=True)
        )
        heading = f" {describe_decision(self.decision)}" if self.decision else ""
        return "\n".join([f"@@ -{old} +{new} @@{heading}", *lines, ""])


def describe_decision(decision: Decision) -> str:
    """The layer, its decision and its source: "conv1: 3 of 64 channels, with batch_norm (net.py:12)"."""
    text = f"{decision.site.name}: {decision.reason or decision.status}"
    if decision.sparsity is not None:
        unit = SELECTIONS[decision.sparsity.select].unit
        text = f"{decision.site.name}: {decision.sparsity.amount} of {decision.sparsity.n} {unit}"
    if decision.region is not None:
        text += f", with {decision.region.label}"
    return f"{text} ({decision.site.source})" if decision.site.source else text


def code_diff(gm: nn.Module) -> str:
    """A unified diff of the generated code before and after the rewrite, one hunk per layer.

    >>> print(fxprop.code_diff(gm))
    --- ResNet before
    +++ ResNet after
    @@ -2,1 +2,2 @@ conv1: 3 of 64 channels (...torchvision/models/resnet.py:268)
    -    conv1 = self.conv1(x);  x = None
    +    conv1_weight = self.conv1.weight
    +    conv1 = fxprop_ops_conv2d(x, conv1_weight, None, stride = (2, 2), ..., k = 3, ...

    The heading of a hunk names the layer, what it keeps and the line of the model's code. `patch` turns the
    code before, `generated_code(fxprop.restore(gm))`, into the code after, which for a module traced in
    parts is that of all of them. Empty if nothing was rewritten. For the mode (train or eval) the module is
    in. Raises ModelError for a module that does not come from `fxprop.transform`.
    """
    with stage("comparing the code"):
        hunks = "".join(map(str, code_changes(gm)))
    name = type(gm).__name__
    return f"--- {name} before\n+++ {name} after\n{hunks}" if hunks else ""


def code_changes(gm: nn.Module) -> tuple[Change, ...]:
    """The hunks of `code_diff` as records, in the order of the code."""
    recipe = recipe_of(gm)
    return tuple(change for section in _sections(gm) for change in _changes(section, recipe))


def code_lines(gm: nn.Module, decision: Decision) -> tuple[str, ...]:
    """The lines before the rewrite that belong to a site; none if it is not a node of a graph."""
    module = dict(_traced_modules(gm)).get(decision.site.graph)
    if module is None:
        return ()
    nodes = {decision.site.node}
    return tuple(
        line for line in _code(module.fx_graphs_before[module.training]) if _assigned_name(line) in nodes
    )


def generated_code(gm: nn.Module, before: bool = False) -> str:
    """The code after the rewrite, or before; of a module traced in parts, each under its name."""
    sections = [(section, section.before if before else section.after) for section in _sections(gm)]
    return "\n".join(line for section, code in sections for line in (*section.heading, *code))


@dataclass(frozen=True)
class _Section:
    """The code of one traced module, as `generated_code` has it."""

    path: str
    module: TracedModule
    # lines between the section before and this one's code
    heading: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    # how many lines stand before the code, before and after the rewrite
    skipped: tuple[int, int]


def backward_code(gm: nn.Module) -> str:
    """The backward of a module whose policy takes part of the mini-batch: what runs on all, and on these.

    >>> gm, _ = fxprop.transform(model, fxprop.Policy(examples=0.5), (x,))
    >>> print(backward_code(gm))

    Two functions of aten operators, with the cut between them; comments name the layer, the user's line and
    the shapes, in which n is the number of examples and k how many are kept. Raises ExamplesError where
    there is no such backward, with the reason.
    """
    recipe = recipe_of(gm)
    known = recipe.examined
    if known is None:
        why = "the policy takes all examples: set examples"
        if recipe.in_force.takes_examples:
            why = "transform had no example_inputs to look at it with"
        raise ExamplesError(f"there is no backward of some of the examples to show: {why}")
    if known.off:
        raise ExamplesError(f"there is no backward of some of the examples: {known.off}")
    return known.backward


def _sections(gm: nn.Module) -> Iterator[_Section]:
    skipped = (0, 0)
    traced = _traced_modules(gm)
    in_parts = [path for path, _ in traced] != [""]
    for path, module in traced:
        heading: tuple[str, ...] = ()
        if in_parts:
            heading = (*([""] if skipped != (0, 0) else []), f"# {path or type(module).__name__}")
        before, after = (
            _code(graphs[module.training]) for graphs in (module.fx_graphs_before, module.fx_graphs)
        )
        skipped = (skipped[0] + len(heading), skipped[1] + len(heading))
        yield _Section(path, module, heading, before, after, skipped)
        skipped = (skipped[0] + len(before), skipped[1] + len(after))


def _traced_modules(gm: nn.Module) -> list[tuple[str, TracedModule]]:
    return [(path, m) for path, m in gm.named_modules() if isinstance(m, TracedModule)]


def op_counts(gm: nn.Module) -> dict[str, tuple[int, int]]:
    """How often each operation stands in the graphs before and after the rewrite.

    >>> op_counts(gm)["fxprop.ops.conv2d"]
    (0, 20)

    A module that is called counts by its class ("Conv2d"), a function by its name. Reading attributes and
    arguments is no operation. For the mode (train or eval) that the module is in.
    """
    counts: dict[str, list[int]] = {}
    for _, module in _traced_modules(gm):
        for side, graphs in enumerate((module.fx_graphs_before, module.fx_graphs)):
            for node in graphs[module.training].nodes:
                name = _count_as(module, node)
                if name is not None:
                    counts.setdefault(name, [0, 0])[side] += 1
    return {name: (before, after) for name, (before, after) in sorted(counts.items())}


def _count_as(module: nn.Module, node: fx.Node) -> str | None:
    """What a node counts as; None for one that only fetches something."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return operation(node) if node.op == "call_function" and node.target is not getattr else None


def operation(node: fx.Node) -> str:
    """What a node calls, by its name: "fxprop.ops.conv2d", "flatten", "layer1.0.bn1"."""
    name = str(getattr(node.target, "__name__", node.target))
    of = getattr(node.target, "__module__", None)
    return f"{of}.{name}" if of and of.startswith("fxprop") else name


def generated_node(gm: nn.Module, decision: Decision) -> fx.Node | None:
    """The node that computes a site after the rewrite; None for a product in code that has no graph."""
    module = dict(_traced_modules(gm)).get(decision.site.graph)
    if module is None or not decision.site.is_node:
        return None
    nodes: dict[str, fx.Node] = {node.name: node for node in module.fx_graphs[module.training].nodes}
    return nodes[decision.node]


def _code(graph: fx.Graph) -> tuple[str, ...]:
    return tuple(str(graph.python_code("self").src).strip().splitlines())


def _assigned_name(line: str) -> str | None:
    """The name of the node that a line of generated code computes."""
    match = _ASSIGNED.match(line)
    return match[1] if match else None


def _changes(section: _Section, recipe: Recipe) -> Iterator[Change]:
    """What differs, layer by layer: the lines of no layer are the same nodes in the same order."""
    decisions, of_before = {}, {}
    for decision in recipe.plans[recipe.mode(section.module.training)].rewritten:
        if decision.site.graph == section.path and decision.site.is_node:
            decisions[decision.site.name] = decision
            behind = decision.region.nodes if decision.region else ()
            of_before.update(dict.fromkeys((decision.site.node, *behind), decision.site.name))
    old = _runs(section.before, of_before)
    new = _runs(section.after, made_for(section.module.fx_graphs[section.module.training]))
    at_old = at_new = 0
    above, below = section.skipped
    place = {run.layer: at for at, run in enumerate(new)}
    stretch = list(itertools.accumulate((run.layer is None for run in new), initial=0))

    def is_ahead(layer: str) -> bool:
        """Whether its lines are still to come before the next lines of no layer."""
        at = place.get(layer, -1)
        return at > at_new and stretch[at] == stretch[at_new]

    while at_old < len(old) or at_new < len(new):
        ours = old[at_old].layer if at_old < len(old) else None
        layer = new[at_new].layer if at_new < len(new) else None
        if ours is not None and not is_ahead(ours):
            layer = ours
        before: tuple[str, ...] = ()
        after: tuple[str, ...] = ()
        if at_old < len(old) and ours == layer:
            before, at_old = old[at_old].lines, at_old + 1
        if at_new < len(new) and new[at_new].layer == layer:
            after, at_new = new[at_new].lines, at_new + 1
        if layer is None:
            yield from _find_differences(before, after, (above, below))
        else:
            yield Change(decisions[layer], (above, below), before, after)
        above, below = above + len(before), below + len(after)


class _Run(NamedTuple):
    """Neighbouring lines of one layer, or of none."""

    layer: str | None
    lines: tuple[str, ...]


def _runs(lines: Sequence[str], owners: Mapping[str, str]) -> list[_Run]:
    of_lines = itertools.groupby(lines, lambda line: owners.get(_assigned_name(line) or ""))
    return [_Run(owner, tuple(group)) for owner, group in of_lines]


def _find_differences(
    before: tuple[str, ...], after: tuple[str, ...], skipped: tuple[int, int]
) -> Iterator[Change]:
    """Neighbouring lines of no layer that differ: they free a value earlier or later than before."""
    pairs = list(enumerate(zip(before, after, strict=True)))
    for differ, group in itertools.groupby(pairs, lambda pair: pair[1][0] != pair[1][1]):
        if differ:
            lines_of = list(group)
            at = lines_of[0][0]
            old, new = zip(*(lines for _, lines in lines_of), strict=True)
            yield Change(None, (skipped[0] + at, skipped[1] + at), old, new)
