"""Graphs in a form that can be pickled: generated code, and what is lost when that is traced again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

# training mode -> graph; a missing mode could not be traced
Graphs = Mapping[bool, fx.Graph]


def copy_graphs(graphs: Graphs) -> Graphs:
    """Copies of the graphs; modes that share one share its copy."""
    twins = {id(graph): copy.deepcopy(graph) for graph in graphs.values()}
    return {mode: twins[id(graph)] for mode, graph in graphs.items()}


class StoredGraphs(NamedTuple):
    """The graphs of a module; its tensors and children are not stored with them."""

    modules: Mapping[bool, fx.GraphModule]
    # mode -> name and stack trace of every node
    nodes: Mapping[bool, list[tuple[str, str | None]]]

    @classmethod
    def of(cls, root: nn.Module, graphs: Graphs) -> StoredGraphs:
        """`graphs`, of the code of `root`."""
        modules = {
            id(graph): fx.GraphModule(_skeleton(root, graph), copy.deepcopy(graph))
            for graph in graphs.values()
        }
        nodes = {
            # tracing leaves out attributes that nothing uses
            mode: [(n.name, n.stack_trace) for n in graph.nodes if n.users or n.target is not getattr]
            for mode, graph in graphs.items()
        }
        return cls({mode: modules[id(graph)] for mode, graph in graphs.items()}, nodes)

    def graphs(self) -> Graphs:
        """The graphs again."""
        named: dict[int, fx.Graph] = {}
        for mode, module in self.modules.items():
            if id(module) not in named:
                named[id(module)] = _with_names(module.graph, self.nodes[mode])
        return {mode: named[id(module)] for mode, module in self.modules.items()}


class HeldGraphs:
    """Graphs as a part of a module's state, which copies and pickles itself."""

    def __init__(self, root: nn.Module | None, graphs: Graphs) -> None:
        self._root, self.graphs = root, graphs

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldGraphs:
        return HeldGraphs(None, copy_graphs(self.graphs))

    def __reduce__(self) -> tuple[Any, ...]:
        assert self._root is not None
        return _held, (StoredGraphs.of(self._root, self.graphs),)


def _held(stored: StoredGraphs) -> HeldGraphs:
    return HeldGraphs(None, stored.graphs())


def _skeleton(root: nn.Module, graph: fx.Graph) -> nn.Module:
    """A module with something in every place that `graph` names: modules, and parameters without entries.

    (Parameters, since tracing computes with anything else.)
    """
    made = nn.Module()
    targets = [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]
    for target in sorted(set(targets)):
        *path, name = target.split(".")
        owner, real = made, root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner, real = getattr(owner, part), getattr(real, part)
        # not evaluated: a property may have effects
        if isinstance(real._modules.get(name), nn.Module):
            owner.add_module(name, nn.Identity())
        else:
            owner.register_parameter(name, nn.Parameter(torch.empty(0)))
    return made


def _with_names(graph: fx.Graph, nodes: list[tuple[str, str | None]]) -> fx.Graph:
    """A copy of `graph` whose nodes have these names, by which sites know them."""
    if len(nodes) != len(graph.nodes):
        return graph
    twin = fx.Graph()
    twin.set_codegen(copy.deepcopy(graph._codegen))
    of: dict[fx.Node, fx.Node] = {}
    for node, (name, stack_trace) in zip(graph.nodes, nodes, strict=True):
        args, kwargs = (fx.map_arg(value, of.__getitem__) for value in (node.args, node.kwargs))
        of[node] = twin.create_node(node.op, node.target, args, kwargs, name, node.type)
        of[node].meta = {**node.meta, "stack_trace": stack_trace}
    return twin
