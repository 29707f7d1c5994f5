"""What every reader of a node needs: where it reads from, and what all sites have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxprop.ops.axes import Shapes
from fxprop.ops.catalogue import OPERATORS
from fxprop.ops.modules import hooks_of
from fxprop.plan.sites import Call, Site
from fxprop.tracing.module_kinds import own_parameters
from fxprop.tracing.observe.records import USED, GraphCall, TensorInfo, tensor_info


@dataclass(frozen=True)
class Context:
    """One graph, one call of it, and the module that holds its tensors."""

    module: nn.Module
    graph: fx.Graph
    # what one call of the graph showed; None without example inputs
    call: GraphCall | None
    # qualified name of `module` in the model; "" for the model itself
    path: str = ""
    # placeholders that are parameters of the model, by their names there
    parameters: Mapping[str, str] = field(default_factory=dict)
    # modules whose sites are found in graphs of their own
    elsewhere: frozenset[str] = frozenset()
    # modules that stay as they are, and why
    reasons: Mapping[str, str] = field(default_factory=dict)

    def name(self, target: str) -> str:
        """The qualified name in the model of what is called `target` in this graph's module."""
        return ".".join(part for part in (self.path, target) if part)

    def parameter_of(self, node: fx.Node) -> str | None:
        """The parameter (named as in this graph's module) that `node` is, or is computed from alone."""
        return self._origins.get(node)

    @functools.cached_property
    def _origins(self) -> Mapping[fx.Node, str]:
        origins: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            name = self._origin(node, origins)
            if name is not None:
                origins[node] = name
        return origins

    def _origin(self, node: fx.Node, origins: Mapping[fx.Node, str]) -> str | None:
        if node.op == "placeholder":
            return self.parameters.get(node.name)
        if node.op == "get_attr":
            target = str(node.target)
            return target if _is_parameter(self.module, target) else None
        inputs = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not all(i in origins for i in inputs):
            return None
        # a scale that a matrix is multiplied with does not give it its name
        return max((origins[i] for i in inputs), key=self._rank, default=None)

    def _rank(self, name: str) -> tuple[int, int]:
        tensor = None if self.parameters else _lookup(self.module, name)
        return (tensor.dim(), tensor.numel()) if isinstance(tensor, torch.Tensor) else (0, 0)

    def info(self, node: fx.Node) -> TensorInfo | None:
        """What is known of the tensor at `node`."""
        known = self.call.outputs.get(node.name) if self.call else None
        if known is None and node.op == "get_attr":
            tensor = _lookup(self.module, str(node.target))
            known = tensor_info(tensor) if isinstance(tensor, torch.Tensor) else None
        return known


def _owner(module: nn.Module, target: str) -> tuple[nn.Module, str]:
    path, _, attribute = target.rpartition(".")
    return module.get_submodule(path), attribute


def _lookup(module: nn.Module, target: str) -> Any:
    """The attribute, if it is stored: a property is left alone, as evaluating it may have effects."""
    owner, attribute = _owner(module, target)
    buffers = nn.Module.named_buffers(owner, recurse=False, remove_duplicate=False)
    return {**vars(owner), **own_parameters(owner), **dict(buffers)}.get(attribute)


def _is_parameter(module: nn.Module, target: str) -> bool:
    owner, attribute = _owner(module, target)
    tensor = _lookup(module, target)
    # hooks such as weight_norm's put a computed weight where the parameter was
    hooked = "forward_pre_hooks" in hooks_of(owner) and attribute in vars(owner)
    computed = isinstance(tensor, torch.Tensor) and (tensor.requires_grad or hooked)
    return isinstance(tensor, nn.Parameter) or computed or parametrize.is_parametrized(owner, attribute)


def own_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter `name`, or what it is computed from where it is parametrized.

    A parametrization is not evaluated, which may have effects; in every one of torch's own the largest of
    its originals has the weight's shape.
    """
    if parametrize.is_parametrized(module, name):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        return max(lists[name].parameters(recurse=False), key=torch.numel, default=None)
    return own_parameters(module).get(name)


def with_shapes(site: Site, context: Context, node: fx.Node, call: Call, weight: TensorInfo | None) -> Site:
    """`site` with its call, and all that the shapes say; with a reason to skip it where they forbid it."""
    if weight is None:
        return replace(site, skip="the shape of its computed weight is known only with example_inputs")
    record = context.call
    input_ = record.outputs.get(call.input.node or "") if record else None
    output = record.outputs.get(node.name) if record else None
    if record is not None and (input_ is None or output is None):
        return replace(site, skip="its input or output is not a tensor")
    if record is not None and node.name in record.used:
        return replace(site, skip=USED)
    reached = record is None or node.name in record.reached
    return with_axes(replace(site, call=call), input_, weight, output, call.constants, reached)


def with_axes(
    site: Site,
    input: TensorInfo | None,
    weight: TensorInfo,
    output: TensorInfo | None,
    constants: Mapping[str, Any],
    reached: bool,
) -> Site:
    """`site` with its axes and shapes; with a reason to skip it where they forbid it.

    `reached`: whether a backward comes to it.
    """
    of = Shapes(input.shape if input else None, weight.shape, output.shape if output else None, constants)
    axes = OPERATORS[site.op].axes(of)
    if isinstance(axes, str):
        return replace(site, call=None, skip=axes)
    if not all(_is_for_loops(tensor) for tensor in (input, weight, output) if tensor):
        axes = axes._replace(alone=None)
    return replace(
        site,
        axes=axes,
        input_shape=of.input,
        weight_shape=weight.shape,
        output_shape=of.output,
        is_complex=weight.dtype.is_complex or (input is not None and input.dtype.is_complex),
        needs_grad_input=reached and (input is None or input.requires_grad),
        needs_grad_weight=reached and weight.requires_grad,
    )


def _is_for_loops(tensor: TensorInfo) -> bool:
    """Whether loops over kept entries can be run on it; under autocast an output has the type it chose."""
    # of a model without memory nothing else is known; "meta" may become the CPU
    return tensor.device in ("cpu", "meta") and tensor.dtype in (torch.float32, torch.float64)


def call_name(target: Callable[..., Any] | str) -> str:
    """What a call node calls, by its short name."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))
