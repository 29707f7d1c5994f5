"""TracedModule: the GraphModule that fxprop hands back.

A `torch.fx.GraphModule` keeps only what its graph mentions, and has one graph. This one keeps the whole
module tree (so state_dict keys, their order, and modules that no graph uses survive), and has one graph
for training and one for evaluation where the model's code differs between the two. It also stays an
instance of the class it was traced from, with its methods; so its own names begin with fx.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxprop.errors import ModelError, TraceError
from fxprop.tracing.hooks import find_uncalled_hooks, is_fully_sharded
from fxprop.tracing.module.assumptions import Assumption, assumptions, describe_assumption, holds, modes
from fxprop.tracing.module.generated_class import (
    generated_class,
    imports_of,
    in_place_of,
    make_fx_class,
    sibling,
)
from fxprop.tracing.module.stored import Graphs, HeldGraphs, copy_graphs
from fxprop.tracing.objects import slot_values
from fxprop.tracing.reach import Reach

_OWN = (
    "_fx_graphs",
    "_fx_before",
    "_fx_untraced",
    "_fx_base",
    "_fx_original",
    "_fx_versions",
    "_fx_generated",
    "_fx_uncalled",
    "_fx_warns_of_hooks",
    "_fx_odd",
    "_fx_assumptions",
    "_fx_changed",
    "_fx_here",
    "_fx_pending",
)
# how many versions of a rewrite are kept
_REMEMBERED = 32
_GRAPH_MODULE = tuple(set(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - set(vars(nn.Module())))


class TracedModule(fx.GraphModule):
    """A GraphModule with its whole module tree, switching graphs with train() and eval().

    `root` is the module tree, which the new module adopts without copying; `graphs` are its graphs;
    `untraced` says why a missing mode is missing.
    """

    def __init__(self, root: nn.Module, graphs: Graphs, class_name: str, untraced: str = "") -> None:
        # GraphModule's own constructor would copy attributes named by the graph, evaluating lazily
        # computed weights as it goes; so it gets nothing to copy
        super().__init__(nn.Module(), fx.Graph(), class_name)
        adopted = vars(root).items()
        self.__dict__.update({k: v for k, v in adopted if k not in (*_GRAPH_MODULE, *_OWN)})
        if isinstance(root, fx.GraphModule):
            self.meta = dict(vars(root).get("meta", {}))
        self._fx_base: type[nn.Module] = nn.Module
        self._fx_original: tuple[type[nn.Module], dict[str, Any]] = nn.Module, {}
        self._fx_set(graphs, untraced)

    def __init_subclass__(cls, **keywords: Any) -> None:
        pass  # a user's, further up, might want arguments, or keep a registry

    @staticmethod
    def fx_install(module: nn.Module, graphs: Graphs, untraced: str) -> TracedModule:
        """Turn `module` itself into a TracedModule that is still an instance of its class.

        Whatever refers to the module (its parents, lists, bound methods) then sees the traced one. (A
        GraphModule's class was made for its one graph, and is left behind.)
        """
        if isinstance(module, TracedModule):
            module._fx_set(graphs, untraced)
            return module
        original = type(module), {key: v for key, v in vars(module).items() if key in _GRAPH_MODULE}
        base = nn.Module if isinstance(module, fx.GraphModule) else type(module)
        module.__dict__.update(_blank_state())
        module.__class__ = _class_on(base, type(module).__name__)
        assert isinstance(module, TracedModule)
        module._fx_base, module._fx_original = base, original
        module._fx_set(graphs, untraced)
        return module

    def fx_uninstall(self) -> None:
        """Be an ordinary module of its class again; the inverse of `fx_install`."""
        self.__class__, own = self._fx_original  # type: ignore[assignment]
        for key in (*_GRAPH_MODULE, *_OWN):
            self.__dict__.pop(key, None)
        self.__dict__.update(own)

    def _fx_set(self, graphs: Graphs, untraced: str) -> None:
        self._fx_begin(graphs, graphs, untraced)
        # names of the modules that were in the other mode than this one when it was traced
        self._fx_odd = frozenset(n for n, m in self.named_modules() if m.training != self.training)
        self._fx_here = self.training
        self._fx_show(self._fx_graphs[self.training])

    def _fx_begin(self, graphs: Graphs, before: Graphs, untraced: str) -> None:
        self._fx_graphs, self._fx_before = dict(graphs), dict(before)
        self._fx_untraced = untraced
        self._fx_versions: dict[Hashable, Graphs] = {}
        # graph -> its generated code, and the class that has it as forward
        self._fx_generated: dict[fx.Graph, tuple[Any, type[nn.Module]]] = {}
        self._fx_warns_of_hooks = True
        # mode -> what its graph takes for granted; empty for copies that fxprop itself works on
        self._fx_assumptions: dict[bool, list[Assumption]] = {}
        # what of that has changed, in whose consequence the code runs as written
        self._fx_changed = ""
        # what is to be done before the first call, when all of its tree is there
        self._fx_pending = "look"

    def _fx_settle(self) -> None:
        with contextlib.suppress(AttributeError):  # while what it refers to is still being made
            self._fx_uncalled = find_uncalled_hooks(self, self._graph)
            if self._fx_pending == "arm":
                self.fx_arm()
            self._fx_pending = ""

    def fx_arm(self) -> None:
        """From now on, notice changes of what the graphs take for granted."""
        if self._fx_assumptions and not self._fx_changed:
            self._fx_follow()
        if self._fx_changed:
            return
        graphs, reach = set(self._fx_graphs.values()), Reach(self)
        of_graph = {graph: assumptions(self, graph, reach) for graph in graphs}
        by_mode = {mode: list(of_graph[graph]) for mode, graph in self._fx_graphs.items()}
        if len(graphs) > 1:
            for mode, graph in self._fx_graphs.items():
                by_mode[mode] += modes(self, graph, functools.partial(self._fx_expected_mode, mode))
        self._fx_assumptions = by_mode

    def _fx_expected_mode(self, mode: bool, name: str) -> bool:
        return mode != (name in self._fx_odd and mode == self._fx_here)

    def _fx_follow(self) -> None:
        """Run the code as written if something has changed that the graph takes for granted; and back."""
        of_mode = self._fx_assumptions.get(self.training, [])
        broken = next((one for one in of_mode if not holds(one)), None)
        if broken is not None and not self._fx_changed:
            self._fx_run_as_written(describe_assumption(broken))
            warnings.warn(
                f"{type(self).__name__}: {self._fx_changed} has changed since the transform. Its code runs "
                "as written from now on, with each layer sparse by itself; transform the model again to "
                "get a graph of its current code.",
                stacklevel=4,
            )
        elif broken is None:
            # equal values in place of those that were there
            of_mode[:] = [(function, argument, function(argument)) for function, argument, _ in of_mode]
            if self._fx_changed:
                self._fx_changed = ""
                self._fx_show(self._fx_graphs[self.training])

    def _fx_run_as_written(self, changed: str) -> None:
        self._fx_changed = changed
        if self._fx_base is nn.Module:
            self._fx_show(self._fx_before[self.training])
        else:
            as_written = sibling(type(self))
            as_written.forward = self._fx_base.forward
            self.__class__ = in_place_of(type(self), as_written)  # type: ignore[assignment]

    def _fx_show(self, graph: fx.Graph) -> None:
        """Run `graph` from now on.

        Each graph has a class of its own, and keeps it: torch.compile tells modules apart by their class
        and code by its code object, and knows both again when a graph comes back.
        """
        if graph in self._fx_generated:
            # private: setting the public `graph` would generate the code anew, on another code object
            self._graph = graph
            self._code, generated = self._fx_generated[graph]
            self.__class__ = in_place_of(type(self), generated)  # type: ignore[assignment]
        else:
            if self._fx_generated:
                self.__class__ = in_place_of(type(self), sibling(type(self)))  # type: ignore[assignment]
            self.graph = graph
        self._fx_pending = self._fx_pending or "look"
        self._fx_settle()

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
        """Called on a copy, which still refers to the original's classes and graphs."""
        self._fx_versions, self._fx_generated, self._fx_assumptions = {}, {}, {}
        if self._fx_changed:
            self._fx_run_as_written(self._fx_changed)
        else:
            self.recompile()
        self._fx_pending = "look"
        self._fx_settle()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # nothing that is written in Python may be called here: torch.compile would take it for the model
        if self._fx_pending:
            self._fx_settle()
        if self._fx_warns_of_hooks and any(self._fx_uncalled.values()):
            self._fx_warn_of_hooks()
        if self._fx_assumptions:
            changed = False
            try:
                for function, argument, value in self._fx_assumptions.get(self.training, ()):
                    if function(argument) is not value:
                        changed = True
                        break
            except Exception:
                changed = True
            if changed != bool(self._fx_changed):
                self._fx_follow()
        return super().__call__(*args, **kwargs)

    def _fx_warn_of_hooks(self) -> None:
        """Say once that hooks were put on modules that this graph does not call."""
        hooked = list(dict.fromkeys(name for (name, _), hooks in self._fx_uncalled.items() if hooks))
        what = (
            f"hooks on {', '.join(hooked)} do not run: the transformed graph does not call them as "
            "modules. Pass preserve_modules=[...] with their names to fxprop.transform"
        )
        if any(is_fully_sharded(self.get_submodule(name)) for name in hooked):
            raise ModelError(f"fully_shard: {what}.")
        self._fx_warns_of_hooks = False
        warnings.warn(f"{what}, or put the hooks on before it.", stacklevel=3)

    # the graphs by mode (one object twice where it makes no difference), now and before a rewrite; and why
    # one mode has none, empty if both have
    fx_graphs = property(lambda self: self._fx_graphs)
    fx_graphs_before = property(lambda self: self._fx_before)
    fx_untraced = property(lambda self: self._fx_untraced)

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
        if not self._fx_changed or self._fx_base is nn.Module:  # code as written knows the mode by itself
            graph = (self._fx_before if self._fx_changed else self._fx_graphs)[mode]
            if self._graph is not graph:
                self._fx_show(graph)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*_GRAPH_MODULE, *_OWN, "graph"):
            object.__setattr__(self, name, value)  # a user's own __setattr__ is for a user's attributes
        else:
            super().__setattr__(name, value)

    # copies are made by the way of pickles, in which the object is there before what it holds, maybe
    # itself; a method would be found by wrappers that look up on their module what they lack
    __copy__ = __deepcopy__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self._fx_base, type(self).__name__), self._fx_state()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # some classes that a module may also be an instance of define their own
        return self.__reduce__()

    def _fx_state(self) -> dict[str, Any]:
        if self._fx_assumptions:
            self.fx_arm()  # notices what has changed so far
        own = {*_GRAPH_MODULE, *_OWN} - {"meta"}
        return {
            "attributes": {key: value for key, value in vars(self).items() if key not in own},
            "slots": dict(slot_values(self)),
            "graphs": HeldGraphs(self, self._fx_graphs),
            "before": HeldGraphs(self, self._fx_before),
            "own": (self._fx_base, self._fx_untraced, self._fx_odd, self._fx_here, self._fx_changed),
            "armed": bool(self._fx_assumptions),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(_blank_state() | state["attributes"])
        for name, value in state["slots"].items():
            object.__setattr__(self, name, value)
        base, untraced, odd, here, changed = state["own"]
        self._fx_base, self._fx_original = base, (base, {})
        graphs, before = (copy_graphs(state[key].graphs) for key in ("graphs", "before"))
        self._fx_begin(graphs, before, untraced)
        self._fx_odd, self._fx_here = odd, here
        self._fx_show(self._fx_graphs[self.training])
        if changed:
            self._fx_run_as_written(changed)
        if state["armed"]:
            self._fx_pending = "arm"
            self._fx_settle()


# Private: compiled code should begin at each graph's own forward, whose number of versions is not limited,
# and not at the method that all of them share. Public disable() would also stop it inside larger models.
_dynamo = torch._C._dynamo.eval_frame
_dynamo.set_code_exec_strategy(
    TracedModule.__call__.__code__,
    _dynamo._FrameExecStrategy(_dynamo._FrameAction.SKIP, _dynamo._FrameAction.DEFAULT),
)


def name_in_the_way(module: nn.Module) -> str | None:
    """A name that both `module` and every GraphModule use; with one it cannot be a TracedModule."""
    if isinstance(module, fx.GraphModule):
        return None
    taken = {*dir(TracedModule), *_GRAPH_MODULE, *_OWN} - {*dir(nn.Module), *vars(nn.Module())}
    held = {*vars(module), *module._modules, *module._parameters, *module._buffers}
    users = [cls for cls in type(module).__mro__ if cls not in nn.Module.__mro__]
    used = held.union(*(vars(cls) for cls in users))
    return min((name for name in taken & used if not name.startswith("__")), default=None)


def _class_on(base: type[nn.Module], class_name: str) -> Any:
    return make_fx_class(class_name, (TracedModule,) if base is nn.Module else (TracedModule, base))


def _blank(base: type[nn.Module], class_name: str) -> TracedModule:
    made: TracedModule = object.__new__(_class_on(base, class_name))
    return made


def _blank_state() -> dict[str, Any]:
    """What GraphModule's own constructor adds to a module."""
    made = vars(fx.GraphModule(nn.Module(), fx.Graph()))
    return {key: made[key] for key in _GRAPH_MODULE}
