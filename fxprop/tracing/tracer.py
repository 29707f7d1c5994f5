"""The tracer: fx.Tracer as far as it records layers, lines and what makes a trace impossible.

A trace that succeeds may still have frozen something; `symbolic.py` looks after that.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import operator
import re
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.overrides import handle_torch_function, has_torch_function

from fxprop.errors import InputError, TraceError
from fxprop.ops.catalogue import SITE_MODULES
from fxprop.ops.registered import registered_classes
from fxprop.tracing import attention
from fxprop.tracing.module_kinds import DROPOUTS, NORMS
from fxprop.tracing.observe.twin import describe, describe_error
from fxprop.tracing.observe.untouched import AUTOCAST
from fxprop.tracing.source_lines import first_line, is_users_code_at_work, users_stack

# module types, or qualified names, that are kept as one call
LeafModules = Collection[type[nn.Module] | str]


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


def format_text(template: str, *values: Any) -> Any:
    """`template.format(*values)`, as generated code calls it."""
    if has_torch_function(values):
        # proxies: the generated code is being traced again
        return handle_torch_function(format_text, values, template, *values)
    return template.format(*values)


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
        # the names of new attributes of the root: tensors that its code makes once
        self.fresh: list[str] = []
        self._names: dict[int, str] = {}
        self._known: list[torch.Tensor] = []

    def get_fresh_qualname(self, prefix: str) -> str:
        self.fresh.append(super().get_fresh_qualname(prefix))
        return self.fresh[-1]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # parameters and buffers alike: what is computed from either is for the graph to compute
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            factory = None
            if not isinstance(attr_val, nn.Parameter):
                factory = functools.partial(_BufferProxy, tracer=self, buffer=attr_val)
            proxy = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=factory)
            parameter_proxy_cache[name] = proxy
        return parameter_proxy_cache[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            # a graph does not hold the context, and would compute with the gradients it forbids
            raise TraceError(
                "code inside torch.no_grad(), torch.autocast(), torch.utils.checkpoint or hooks on saved "
                "tensors cannot be kept in an fx graph"
            )
        lines = self.record_stack_traces
        # to note the stack takes longer than all else that is done for a node
        # of a placeholder always: the first note of a stack imports dynamo, which must see Python's math as
        # it is, and fx has wrapped that by the time of other nodes
        noted = args[0] == "placeholder" or is_users_code_at_work(SiteTracer.trace.__code__)
        self.record_stack_traces = lines and noted
        try:
            node = super().create_node(*args, **kwargs)
        finally:
            self.record_stack_traces = lines
        if node.stack_trace is not None:
            node.stack_trace = users_stack(node.stack_trace)
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self._leaf_types) or module_qualified_name in self._leaf_names:
            return True
        if attention.is_attention(m):
            return False
        kept = (*SITE_MODULES, *registered_classes(), *NORMS, *DROPOUTS)
        if isinstance(m, kept) or super().is_leaf_module(m, module_qualified_name):
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
        if isinstance(a, str) and "Proxy(" in a:
            return self._text(a)
        if isinstance(a, torch.Tensor):
            # one that the same code has made before, in the other mode
            a = next((known for known in self._known if _is_same(known, a)), a)
        if type(a) is OrderedDict:
            # fx would make it a plain dict
            items = [(key, value) for key, value in a.items()]
            return self.create_proxy("call_function", OrderedDict, (items,), {}).node
        if isinstance(a, dict) and type(a) is not dict and not isinstance(a, immutable_dict):
            raise TraceError(f"a {type(a).__name__}, which an fx graph would turn into a plain dict")
        return super().create_arg(a)

    def _text(self, text: str) -> fx.Node:
        """A text that tells of tensors' sizes and the like, to be made when the graph runs."""
        parts = re.split(r"Proxy\((\w+)\)", text.replace("{", "{{").replace("}", "}}"))
        nodes = {node.name: node for node in self.graph.nodes}
        values = [self.proxy(nodes[name]) for name in parts[1::2]]
        return self.create_proxy("call_function", format_text, ("{}".join(parts[::2]), *values), {}).node

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # A placeholder for an optional argument would look "given" to `if mask is not None`. So what
        # the caller leaves out, and what is no tensor, becomes the constant it is.
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for node in self.graph.nodes:
            if node.target in ("nan", "inf") or not all(_is_literal(default) for default in node.args):
                raise TraceError(
                    f"{first_line(root_fn)}: generated code cannot take argument {node.target!r} with its "
                    "default"
                )
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
        tensors = (*reversed(list(root.named_buffers())), *reversed(list(root.named_parameters())))
        self._names = {id(tensor): name for name, tensor in tensors}
        self._known = [v for name, v in vars(root).items() if name.startswith("_tensor_constant")]
        try:
            graph = super().trace(root, concrete_args)
            _check_stores_nothing(root)
            return graph
        except InputError:
            raise
        except Exception as error:
            where = self._failed_in or the_model(root)
            raise TraceError(_explain(error, where)) from error


def _modes() -> tuple[object, ...]:
    # private, but nothing public tells; True: also while torch.compile or fx is tracing
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (
        torch.is_grad_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in AUTOCAST),
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


def _is_same(known: torch.Tensor, new: torch.Tensor) -> bool:
    alike = (
        known.dtype == new.dtype and known.device == new.device and known.requires_grad == new.requires_grad
    )
    return known is new or (alike and not isinstance(new, nn.Parameter) and torch.equal(known, new))


def the_model(root: nn.Module) -> str:
    return f"the model itself ({type(root).__name__})"


def _is_literal(value: Any) -> bool:
    """Whether generated code can have `value` as the default of an argument."""
    if isinstance(value, tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def _explain(error: Exception, where: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = {Path(__file__).parent, Path(inspect.getfile(fx)).parent}
    users = [f for f in frames if ours.isdisjoint(Path(f.filename).parents)]
    # the user's own line says more than the line inside torch.nn that it led to
    torch_files = Path(torch.__file__).parent
    outside = [f for f in users if torch_files not in Path(f.filename).parents]
    frame = (outside or users or list(frames))[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    callers = [f"{f.filename}:{f.lineno}" for f in outside if f is not frame]
    outer = f" (from {', '.join(callers[-2:])})" if callers else ""
    return (
        f"torch.fx cannot trace {where} at {frame.filename}:{frame.lineno}: `{line}`{outer}: "
        f"{describe_error(error)}. Keep that module as one call with leaf_modules=[...] (its class or its "
        "name; its layers then stay dense), or move the line into a function marked with torch.fx.wrap."
    )


_FIXED = frozenset(("shape", "dtype", "device", "ndim", "layout", "is_cuda", "size", "dim", "numel"))


class _BufferProxy(fx.Proxy):
    """A buffer in a trace, whose shape and the like are what they are."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self._buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name) if name in _FIXED else super().__getattr__(name)

    def __len__(self) -> int:
        return len(self._buffer)

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, position) for position in range(len(self))])
