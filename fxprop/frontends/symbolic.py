"""The symbolic front-end: an nn.Module in, its graphs out, by torch.fx tracing.

Takes any nn.Module (or GraphModule, whose graph is used as it is). The model is never changed: a copy of
its module tree is traced. Knows nothing of sparsity.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.overrides import handle_torch_function, has_torch_function

from fxprop.errors import InputError, TraceError
from fxprop.frontends import attention
from fxprop.frontends.fakes import describe
from fxprop.frontends.leaves import SITE_MODULES
from fxprop.frontends.module import Graphs, TracedModule, copy_graphs
from fxprop.frontends.source import users_stack
from fxprop.frontends.tree import copy_tree
from fxprop.ops.table import registered_classes

# module types, or qualified names, that are kept as one call
LeafModules = Collection[type[nn.Module] | str]

_NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class TracedGraphs(NamedTuple):
    """What tracing a module gave."""

    graphs: Graphs
    # why one mode has no graph; empty if both have
    untraced: str
    # tensors that the code makes once, by the name under which the graphs fetch them from the module
    constants: Mapping[str, Any]


def trace_modes(
    model: nn.Module, given: Mapping[str, Any] | None = None, leaf_modules: LeafModules = ()
) -> TracedGraphs:
    """The graphs of `model` in its present mode and, where the code differs, in the other one.

    >>> found = trace_modes(torchvision.models.resnet18().train())
    >>> found.graphs[True] is found.graphs[False]
    True

    `given` maps argument names to example values; see `bind_arguments`. Arguments with a default that
    are not given, and given values that are not tensors, are fixed to their values, which the graph
    checks at run time; None fixes nothing. Raises TraceError naming the module and source line that
    stopped it; if only the other mode cannot be traced, returns why.
    """
    if isinstance(model, TracedModule):
        return TracedGraphs(copy_graphs(model.fx_graphs), model.fx_untraced, {})
    if isinstance(model, fx.GraphModule):
        return TracedGraphs(copy_graphs(dict.fromkeys((True, False), model.graph)), "", {})
    here, why = model.training, ""
    tree = copy_tree(model)
    graphs = {here: SiteTracer(leaf_modules, given).trace(tree)}
    # of the traced copy, so that a constant has one name in both
    other_tree = copy_tree(tree)
    for module in other_tree.modules():
        module.training = not here
    try:
        there = SiteTracer(leaf_modules, given).trace(other_tree)
    except TraceError as error:
        why = str(error)
    else:
        same = there.python_code("self").src == graphs[here].python_code("self").src
        graphs[not here] = graphs[here] if same else there
        tree = other_tree
    named = {str(n.target) for graph in graphs.values() for n in graph.nodes if n.op == "get_attr"}
    constants = {key: value for key, value in vars(tree).items() if key in named - set(vars(model))}
    return TracedGraphs(graphs, why, constants)


@fx.has_side_effect
def check_fixed(value: Any, name: str, fixed: Any) -> None:
    """Raise InputError unless `value` is what argument `name` was fixed to when the graph was made."""
    if has_torch_function((value,)):
        # a proxy: the generated code is being traced again
        handle_torch_function(check_fixed, (value,), value, name, fixed)
        return
    if not (value is fixed or (type(value) is type(fixed) and value == fixed)):
        raise InputError(
            f"argument {name!r} is {describe(value)}, but the graph was made for {name}={fixed!r}; "
            "transform again with that value in example_inputs or example_kwargs"
        )


class SiteTracer(fx.Tracer):
    """fx.Tracer that records source lines and keeps stateful layers whole.

    Leaves, besides torch.nn's own modules: every conv and linear subclass; normalisation and dropout
    from anywhere, and other weightless modules that read `self.training` (their behaviour must follow
    train() and eval()); what the user names.
    """

    def __init__(self, leaf_modules: LeafModules = (), given: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.record_stack_traces = True
        self._leaf_types = tuple(leaf for leaf in leaf_modules if not isinstance(leaf, str))
        self._leaf_names = {leaf for leaf in leaf_modules if isinstance(leaf, str)}
        # None: fix nothing, as when generated code is traced again
        self._given = given
        self._failed_in: str | None = None
        self._modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            # a graph does not hold the context, and would compute with the gradients it forbids
            raise TraceError(
                "code inside torch.no_grad(), torch.autocast(), torch.utils.checkpoint or hooks on saved "
                "tensors cannot be kept in an fx graph"
            )
        node = super().create_node(*args, **kwargs)
        if node.stack_trace is not None:
            node.stack_trace = users_stack(node.stack_trace)
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self._leaf_types) or module_qualified_name in self._leaf_names:
            return True
        if attention.is_attention(m):
            return False
        if isinstance(m, (*SITE_MODULES, *registered_classes())) or super().is_leaf_module(
            m, module_qualified_name
        ):
            return True
        if isinstance(m, (*_NORM_MODULES, nn.modules.dropout._DropoutNd)):
            return True
        return not _holds_weights(m) and _depends_on_mode(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if attention.is_attention(m):
            forward = functools.partial(attention.forward, m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self._failed_in is None:
                self._failed_in = f"module {self.path_of_module(m)!r} ({type(m).__name__})"
            raise

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:
            # fx would make it a plain dict
            items = [(key, value) for key, value in a.items()]
            return self.create_proxy("call_function", OrderedDict, (items,), {}).node
        if isinstance(a, dict) and type(a) is not dict and not isinstance(a, immutable_dict):
            raise TraceError(f"a {type(a).__name__}, which an fx graph would turn into a plain dict")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # A placeholder for an optional argument would look "given" to `if mask is not None`. So what
        # the caller leaves out, and what is no tensor, becomes the constant it is.
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self._given is None:
            return fn, args
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(inspect.unwrap(root_fn)).parameters.items()
        }
        for position, arg in enumerate(args):
            if not isinstance(arg, fx.Proxy):
                continue
            name = str(arg.node.target)
            value = self._given.get(name, defaults.get(name, inspect.Parameter.empty))
            if value is None or isinstance(value, bool | int | float | str):
                self.create_proxy("call_function", check_fixed, (arg, name, value), {})
                args[position] = value
        return fn, args

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        if "forward" in vars(root):
            # fx would trace the class's
            raise TraceError(f"the forward of this {type(root).__name__} was replaced on the instance")
        try:
            graph = super().trace(root, concrete_args)
            _check_stores_nothing(root)
            return graph
        except InputError:
            raise
        except Exception as error:
            where = self._failed_in or f"the model itself ({type(root).__name__})"
            raise TraceError(_explain(error, where)) from error


def _modes() -> tuple[object, ...]:
    # private, but nothing public tells; True: also while torch.compile or fx is tracing
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (
        torch.is_grad_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        None if hooks is None else id(hooks[0]),
    )


def _check_stores_nothing(root: nn.Module) -> None:
    """Raise TraceError if the code has put one of its tensors in an attribute, which a graph would not."""
    for name, module in root.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, fx.Proxy) or (
                isinstance(value, list | tuple) and any(isinstance(v, fx.Proxy) for v in value)
            ):
                raise TraceError(
                    f"module {name!r} stores a tensor in its attribute {attribute!r}, which an fx graph "
                    "would not do"
                )


def _holds_weights(module: nn.Module) -> bool:
    """Whether a conv, linear or raw matrix weight lives inside, which a leaf would hide."""
    return any(isinstance(m, tuple(SITE_MODULES)) for m in module.modules()) or any(
        p.dim() >= 2 for p in module.parameters()
    )


def _depends_on_mode(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    if "norm" in name or "drop" in name:
        return True
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def _explain(error: Exception, where: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own, fx_files = Path(__file__), Path(inspect.getfile(fx)).parent
    users = [f for f in frames if Path(f.filename) != own and fx_files not in Path(f.filename).parents]
    # the user's own line says more than the line inside torch.nn that it led to
    torch_files = Path(torch.__file__).parent
    outside = [f for f in users if torch_files not in Path(f.filename).parents]
    frame = (outside or users or list(frames))[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"torch.fx cannot trace {where} at {frame.filename}:{frame.lineno}: `{line}`: {reason}. "
        "Keep that module as one call with leaf_modules=[...] (its class or its name; its layers then stay "
        "dense), or move the line into a function marked with torch.fx.wrap."
    )


def bind_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Example values by the argument names of `model.forward`; InputError if they do not fit it."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {error}"
        ) from error
    return dict(bound.arguments)
