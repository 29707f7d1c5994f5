"""TracedModule: the GraphModule that fxprop hands back.

A `torch.fx.GraphModule` keeps only what its graph mentions, and has one graph. This one keeps the whole
module tree (so state_dict keys, their order, and modules that no graph uses survive), and has one graph
for training and one for evaluation where the model's code differs between the two. It also stays an
instance of the class it was traced from, with its methods; so its own names begin with fx.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxprop.errors import ModelError, TraceError
from fxprop.frontends.generated import generated_class, imports_of, in_place_of, sibling
from fxprop.frontends.hooks import registries
from fxprop.frontends.tree import copy_tree

# training mode -> graph; a missing mode could not be traced
Graphs = Mapping[bool, fx.Graph]

_OWN = (
    "_fx_graphs",
    "_fx_before",
    "_fx_untraced",
    "_fx_base",
    "_fx_versions",
    "_fx_generated",
    "_fx_uncalled",
    "_fx_warns_of_hooks",
)
# how many versions of a rewrite are kept
_REMEMBERED = 32
_GRAPH_MODULE = tuple(set(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - set(vars(nn.Module())))


class TracedModule(fx.GraphModule):
    """A GraphModule with its whole module tree, switching graphs with train() and eval().

    `root` is the module tree, which the new module adopts without copying; `graphs` are its graphs;
    `before` the graphs before a rewrite, if there was one; `untraced` why a missing mode is missing.
    """

    def __init__(
        self,
        root: nn.Module,
        graphs: Graphs,
        class_name: str,
        before: Graphs | None = None,
        untraced: str = "",
    ) -> None:
        # GraphModule's own constructor would copy attributes named by the graph, evaluating lazily
        # computed weights as it goes; so it gets nothing to copy
        super().__init__(nn.Module(), fx.Graph(), class_name)
        adopted = vars(root).items()
        self.__dict__.update({k: v for k, v in adopted if k not in (*_GRAPH_MODULE, *_OWN)})
        if isinstance(root, fx.GraphModule):
            self.meta = dict(root.meta)
        self._fx_base: type[nn.Module] = nn.Module
        self._fx_set(graphs, before, untraced)

    @classmethod
    def fx_install(
        cls,
        module: nn.Module,
        graphs: Graphs,
        before: Graphs | None = None,
        untraced: str = "",
    ) -> TracedModule:
        """Turn `module` itself into a TracedModule that is still an instance of its class.

        Whatever refers to the module (its parents, lists, bound methods) then sees the traced one.
        """
        if isinstance(module, TracedModule):
            module._fx_set(graphs, before, untraced)
            return module
        base = type(module)
        blank = fx.GraphModule(nn.Module(), fx.Graph())
        module.__dict__.update({key: vars(blank)[key] for key in _GRAPH_MODULE})
        # the name by which fx knows a class made for one module
        impl = type(base.__name__, (cls, base), {"__qualname__": "GraphModuleImpl"})
        module.__class__ = impl
        assert isinstance(module, TracedModule)
        module._fx_base = base
        module._fx_set(graphs, before, untraced)
        return module

    def fx_uninstall(self) -> None:
        """Be an ordinary module of its class again; the inverse of `install`."""
        self.__class__ = self._fx_base  # type: ignore[assignment]
        for key in (*_GRAPH_MODULE, *_OWN):
            self.__dict__.pop(key, None)

    def _fx_set(self, graphs: Graphs, before: Graphs | None, untraced: str) -> None:
        self._fx_graphs = dict(graphs)
        self._fx_before = dict(graphs if before is None else before)
        self._fx_untraced = untraced
        self._fx_versions: dict[Hashable, Graphs] = {}
        # graph -> its generated code, and the class that has it as forward
        self._fx_generated: dict[fx.Graph, tuple[Any, type[nn.Module]]] = {}
        self._fx_warns_of_hooks = True
        self._fx_show(self._fx_graphs[self.training])

    def _fx_show(self, graph: fx.Graph) -> None:
        """Run `graph` from now on.

        Each graph has a class of its own, and keeps it: torch.compile tells modules apart by their class
        and code by its code object, and knows both again when a graph comes back.
        """
        if graph in self._fx_generated:
            self._graph = graph
            self._code, generated = self._fx_generated[graph]
            self.__class__ = in_place_of(type(self), generated)  # type: ignore[assignment]
        else:
            if self._fx_generated:
                self.__class__ = in_place_of(type(self), sibling(type(self)))  # type: ignore[assignment]
            self.graph = graph
        self._fx_uncalled = _uncalled(self, graph)

    def recompile(self) -> Any:
        """Regenerate the code from the graph, as after editing it."""
        outer = type(self)
        generated = generated_class(outer)
        # the code belongs on the class made for it, not on one that fully_shard has put on top
        self.__class__ = generated  # type: ignore[assignment]
        try:
            made = super().recompile()
        finally:
            self.__class__ = outer
        if "_fx_generated" in vars(self):
            self._fx_generated[self._graph] = self._code, generated
        return made

    def fx_version(self, key: Hashable) -> Graphs | None:
        """The graphs that were shown under `key`, if they are remembered."""
        return self._fx_versions.get(key)

    def fx_show_version(self, key: Hashable, graphs: Graphs) -> None:
        """Run other graphs, made from those before the rewrite.

        The last few versions are remembered with their generated code.
        """
        self._fx_versions.pop(key, None)
        self._fx_versions[key] = self._fx_graphs = dict(graphs)
        for oldest in list(self._fx_versions)[:-_REMEMBERED]:
            del self._fx_versions[oldest]
        shown = {graph for of_modes in self._fx_versions.values() for graph in of_modes.values()}
        self._fx_generated = {graph: made for graph, made in self._fx_generated.items() if graph in shown}
        self._fx_show(self._fx_graphs[self.training])

    def fx_after_copy(self) -> None:
        """Called on a copy made by `copy_tree`, which still refers to the original's classes."""
        self._fx_versions, self._fx_generated = {}, {}
        self.recompile()
        self._fx_uncalled = _uncalled(self, self._graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # nothing that is written in Python may be called here: torch.compile would take it for the model
        if self._fx_warns_of_hooks and any(self._fx_uncalled.values()):
            self._fx_warn_of_hooks()
        return super().__call__(*args, **kwargs)

    def _fx_warn_of_hooks(self) -> None:
        """Say once that hooks were put on modules that this graph does not call."""
        hooked = list(dict.fromkeys(name for (name, _), hooks in self._fx_uncalled.items() if hooks))
        what = (
            f"hooks on {', '.join(hooked)} do not run: the transformed graph does not call them as "
            "modules. Pass preserve_modules=[...] with their names to fxprop.transform"
        )
        classes = {base.__name__ for name in hooked for base in type(self.get_submodule(name)).__mro__}
        if "FSDPModule" in classes:
            raise ModelError(f"fully_shard: {what}.")
        self._fx_warns_of_hooks = False
        warnings.warn(f"{what}, or put the hooks on before it.", stacklevel=3)

    @property
    def fx_graphs(self) -> Graphs:
        """The graph of each mode; the same object twice where the mode makes no difference."""
        return self._fx_graphs

    @property
    def fx_graphs_before(self) -> Graphs:
        """The graphs before the rewrite."""
        return self._fx_before

    @property
    def fx_untraced(self) -> str:
        """Why one mode has no graph; empty if both have."""
        return self._fx_untraced

    def to_folder(self, folder: str | os.PathLike[str], module_name: str = "FxModule") -> None:
        """Write the code and the state as a package, as GraphModule does, with the imports that it needs.

        The package has the graph of the mode (train or eval) the module is in.
        """
        super().to_folder(folder, module_name)
        file = Path(folder) / "module.py"
        code = file.read_text(encoding="utf-8")
        file.write_text("\n".join([*imports_of(self._graph), code]), encoding="utf-8")

    def train(self, mode: bool = True) -> TracedModule:
        """Set train or eval mode, and the graph that belongs to it."""
        if mode not in self._fx_graphs:
            here, there = ("eval", "train") if mode else ("train", "eval")
            raise TraceError(
                f"{type(self).__name__} was transformed in {here} mode; its code could not be traced in "
                f"{there} mode: {self._fx_untraced} Call .{there}() on the original model and transform "
                "that."
            )
        super().train(mode)
        if self._graph is not self._fx_graphs[mode]:
            self._fx_show(self._fx_graphs[mode])
        return self

    def fx_tree(self) -> nn.Module:
        """A module of the original class that holds a copy of the module tree, sharing every tensor."""
        holder = object.__new__(self._fx_base)
        dropped = {*_GRAPH_MODULE, *_OWN}
        holder.__dict__.update({k: v for k, v in vars(self).items() if k not in dropped})
        return copy_tree(holder)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        tree = copy.deepcopy(self.fx_tree(), memo)
        graphs = copy_graphs(self._fx_graphs)
        before = copy_graphs(self._fx_before)
        return _build(tree, graphs, type(self).__name__, before, self._fx_untraced)

    def __reduce__(self) -> tuple[Any, ...]:
        tree = self.fx_tree()
        graphs, before = _Stored.of(tree, self._fx_graphs), _Stored.of(tree, self._fx_before)
        return _from_stored, (tree, graphs, type(self).__name__, before, self._fx_untraced)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # some classes that a module may also be an instance of define their own
        return self.__reduce__()


# Private: compiled code should begin at each graph's own forward, whose number of versions is not limited,
# and not at the method that all of them share. Public disable() would also stop it inside larger models.
_dynamo = torch._C._dynamo.eval_frame
_dynamo.set_code_exec_strategy(
    TracedModule.__call__.__code__,
    _dynamo._FrameExecStrategy(_dynamo._FrameAction.SKIP, _dynamo._FrameAction.DEFAULT),
)


def _uncalled(root: nn.Module, graph: fx.Graph) -> dict[tuple[str, str], Mapping[int, Any]]:
    """Where the modules in `root` that `graph` does not call keep their hooks: (name, kind) -> hooks."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}

    def below(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:depth]) in called for depth in range(1, len(parts) + 1))

    modules = [(name, module) for name, module in root.named_modules() if name and not below(name)]
    return {(name, kind): hooks for name, module in modules for kind, hooks in registries(module).items()}


def copy_graphs(graphs: Graphs) -> Graphs:
    """Copies of the graphs; modes that share one share its copy."""
    twins = {id(graph): copy.deepcopy(graph) for graph in graphs.values()}
    return {mode: twins[id(graph)] for mode, graph in graphs.items()}


def _build(tree: nn.Module, graphs: Graphs, class_name: str, before: Graphs, untraced: str) -> TracedModule:
    if type(tree) is nn.Module:
        return TracedModule(tree, graphs, class_name, before, untraced)
    return TracedModule.fx_install(tree, graphs, before, untraced)


class _Stored(NamedTuple):
    """Graphs as they can be pickled: generated code, and what is lost when that is traced again."""

    modules: Mapping[bool, fx.GraphModule]
    # mode -> name and stack trace of every node
    nodes: Mapping[bool, list[tuple[str, str | None]]]

    @classmethod
    def of(cls, tree: nn.Module, graphs: Graphs) -> _Stored:
        """`graphs`, on the module tree that they are of."""
        modules = {id(graph): fx.GraphModule(tree, copy.deepcopy(graph)) for graph in graphs.values()}
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


def _from_stored(
    tree: nn.Module, graphs: _Stored, class_name: str, before: _Stored, untraced: str
) -> TracedModule:
    return _build(tree, graphs.graphs(), class_name, before.graphs(), untraced)
