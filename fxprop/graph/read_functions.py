"""Reading function calls: products with a weight, by torch's functions, methods and aten operators.

Other calls that use a matrix parameter are listed with the reason why they stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxprop.graph.context import Context, call_name, with_shapes
from fxprop.ops.catalogue import SITE_MODULES, read
from fxprop.ops.reads import Product
from fxprop.plan.sites import Call, Operand, Site
from fxprop.tracing.captured import module_in_stack
from fxprop.tracing.module_kinds import IS_MODULE, is_users
from fxprop.tracing.source_lines import source_line

# Multiplications by a parameter that have no sparse operator: by name, for functions, methods and aten
_PRODUCTS = {
    *("matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "addmv", "mv", "dot", "einsum", "tensordot"),
    *("bilinear", "conv_tbc", "rmatmul", "inner", "chain_matmul", "multi_dot", "grouped_mm", "_grouped_mm"),
}


# nn.MultiheadAttention's own parameters: its layers are called attn.in_proj and so on
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def read_call(context: Context, node: fx.Node) -> Site | None:
    """The site at a call_function or call_method node, or None if it is not an input times a weight."""
    target: Any = node.target
    if node.op == "call_method":
        # x.matmul(w) is torch.Tensor.matmul(x, w)
        target = getattr(torch.Tensor, str(target), None)

    def is_weight(operand: Any) -> bool:
        return isinstance(operand, fx.Node) and context.parameter_of(operand) is not None

    product = read(target, node.args, node.kwargs, is_weight)
    if product is None:
        return _opaque(context, node)
    site = read_product(context, node, product)
    # a product of parameters alone computes a weight, unless it is a layer on a learned input
    return None if is_weight(product.input) and not _is_of_layer(site) else site


def _is_of_layer(site: Site) -> bool:
    """Whether the weight belongs to a module of torch.nn that computes exactly this product."""
    return any(cls.__name__ in site.types and site.op == of.name for cls, of in SITE_MODULES.items())


def read_product(context: Context, node: fx.Node, product: Product) -> Site:
    """The site of a product whose operands are nodes."""
    weight = product.weight
    parameter = context.parameter_of(weight) if isinstance(weight, fx.Node) else None
    site = Site(
        name=node.name if parameter is None else _site_name(context, parameter, node),
        op=product.op,
        node=node.name,
        graph=context.path,
        types=() if parameter is None else _types(context, parameter, node),
        source=source_line(node.stack_trace),
    )
    if not isinstance(product.input, fx.Node) or not isinstance(weight, fx.Node):
        return replace(site, skip="input or weight is a constant of the graph")
    computed = [
        name for name, value in product.constants.items() if _mentions_node(value) and name != "offs"
    ]
    if computed:
        return replace(site, skip=f"{', '.join(computed)} is computed in the graph")
    constants = {
        name: Operand(node=value.name) if isinstance(value, fx.Node) else value
        for name, value in product.constants.items()
    }
    call = Call(
        input=Operand(node=product.input.name),
        weight=Operand(node=weight.name),
        bias=Operand(node=product.bias.name) if isinstance(product.bias, fx.Node) else None,
        constants=constants,
    )
    if product.op == "addmm" and call.bias is None:
        return replace(site, skip="its bias is a constant of the graph")
    return with_shapes(site, context, node, call, context.info(weight))


def _site_name(context: Context, parameter: str, node: fx.Node) -> str:
    """The weight's module path, with the weight's own name if that is not "weight"."""
    if node.meta.get(IS_MODULE):
        return context.path
    name = context.name(parameter)
    if name.endswith(".weight"):
        module = name.removesuffix(".weight")
        owner = module_in_stack(node) if context.parameters else None
        # a tied weight has one name, and several modules that use it
        return module if owner is None or module.endswith(owner[0]) else owner[0]
    path, dot, own = name.rpartition(".")
    return path + dot + (own.removesuffix("_weight") if own in _ATTENTION_WEIGHTS else own)


def _types(context: Context, parameter: str, node: fx.Node) -> tuple[str, ...]:
    """The class of the module whose `weight` it is, and of its bases."""
    if node.meta.get(IS_MODULE):
        return type_names(type(context.module))
    path, _, own = parameter.rpartition(".")
    if own != "weight":
        return ()
    if not context.parameters:
        return type_names(type(context.module.get_submodule(path)))
    # a captured graph has its modules in the metadata alone
    owner = module_in_stack(node)
    return () if owner is None else type_names(owner[1])


def type_names(module_class: type) -> tuple[str, ...]:
    """Names of a module class and of its bases up to nn.Module, without private ones."""
    classes = [c for c in module_class.__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    generated = [c for c in classes if issubclass(c, fx.GraphModule) or c is fx.GraphModule]
    return tuple(c.__name__ for c in classes if c not in generated and not c.__name__.startswith("_"))


def _mentions_node(value: Any) -> bool:
    nodes: list[fx.Node] = []
    fx.map_arg(value, nodes.append)
    return bool(nodes)


def _opaque(context: Context, node: fx.Node) -> Site | None:
    """A call that uses a matrix parameter in a way that has no sparse operator."""
    name = call_name(node.target).strip("_")
    weights = [n for n in node.all_input_nodes if _is_matrix(context, n)]
    if not weights:
        return None  # an activation product, such as attention's: nothing to name
    parameter = context.parameter_of(weights[0])
    assert parameter is not None
    if name in _PRODUCTS:
        if context.parameter_of(node) is not None:
            return None  # part of how a weight is computed
        reason = f"{name} with a parameter has no sparse operator; its FLOPs are in `other`"
    elif node.op == "call_function" and is_users(node.target):
        names = ", ".join(str(context.parameter_of(weight)) for weight in weights)
        reason = f"function {name} is kept as one call and uses {names}; its FLOPs are in `other`"
    else:
        return None
    return Site(
        name=_site_name(context, parameter, node),
        op=name,
        node=node.name,
        graph=context.path,
        skip=reason,
        source=source_line(node.stack_trace),
    )


def _is_matrix(context: Context, node: fx.Node) -> bool:
    if context.parameter_of(node) is None:
        return False
    info = context.info(node)
    return info is None or len(info.shape) >= 2
