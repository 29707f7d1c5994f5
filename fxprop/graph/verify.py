"""Checks of a rewritten module against the one it came from. Raises RewriteError; changes nothing."""

from __future__ import annotations

import warnings

from torch import fx, nn

from fxprop.errors import RewriteError
from fxprop.ops.catalogue import OPERATORS
from fxprop.ops.regions.table import REGIONS
from fxprop.plan.decisions import Decision


def verify_graph(before: fx.Graph, after: fx.Graph, decisions: tuple[Decision, ...]) -> None:
    """The graph is well-formed, takes and returns the same, and holds what was planned."""
    with warnings.catch_warnings():
        # lint warns of attributes that are properties, as lazily computed weights are
        warnings.filterwarnings("ignore", message=".*does not reference an nn.Module")
        try:
            after.lint()
        except RuntimeError as error:
            raise RewriteError(f"the rewritten graph is malformed: {error}") from error
    for op in ("placeholder", "output"):
        old, new = _interface(before, op), _interface(after, op)
        if old != new:
            raise RewriteError(f"the rewrite changed the graph's {op}s from {old} to {new}")
    planned = {d.node for d in decisions}
    rewritten = {node.name for node in rewritten_nodes(after)} - {
        node.name for node in rewritten_nodes(before)
    }
    if planned != rewritten:
        raise RewriteError(
            f"{len(planned)} sites were planned and {len(rewritten)} rewritten; "
            f"they differ in {sorted(planned ^ rewritten)}"
        )


def rewritten_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of `graph` that call a sparse operator."""
    functions = {of.sparse for of in OPERATORS.values()} | {of.sparse for of in REGIONS.values()}
    return [n for n in graph.nodes if n.op == "call_function" and n.target in functions]


def _interface(graph: fx.Graph, op: str) -> list[str]:
    return [f"{n.name}({n.target}, {n.args}, {n.kwargs})" for n in graph.nodes if n.op == op]


def verify_state(model: nn.Module, rewritten: nn.Module) -> None:
    """The rewritten module holds the very tensors of `model`, under the same keys in the same order."""
    for kind in ("named_parameters", "named_buffers"):
        old = list(getattr(model, kind)(remove_duplicate=False))
        new = list(getattr(rewritten, kind)(remove_duplicate=False))
        if [name for name, _ in old] != [name for name, _ in new]:
            raise RewriteError(f"the rewritten module's {kind} have other names or another order")
        for (name, ours), (_, theirs) in zip(old, new, strict=True):
            if ours is not theirs:
                raise RewriteError(f"the rewritten module holds a copy of {name!r}, not the tensor itself")
    if list(model.state_dict()) != list(rewritten.state_dict()):
        raise RewriteError("the rewritten module has other state_dict keys, or another order")
