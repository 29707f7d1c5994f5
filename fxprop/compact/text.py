"""A cut backward as text: the two graphs as code, with the layer and the line that each part belongs to."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator

from torch import Tensor, fx, nn

from fxprop.compact.cut import Cut
from fxprop.graph.rewrite import META_KEY
from fxprop.tracing.captured import module_in
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.source_lines import source_line

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
# a line of generated code: the node's name, and what it does
_ASSIGNMENT = re.compile(r"^\s+(?P<name>\w+)(?: : [^=]+)? = ", re.MULTILINE)


def describe_cut(cut: Cut, module: nn.Module) -> str:
    """The backward of `module` in two parts; `module` says which layers its lines belong to.

    The number of examples is written n in front of the cut and k behind it.
    """
    origin = _origins(module)
    nodes = [node for node in cut.compact.graph.nodes if node.op == "placeholder"]
    gradients = [f"{nodes[number].name} {_shape(nodes[number], cut, 'n')}" for number in cut.gradients]
    parts = []
    if cut.loss is not None:
        parts.append("\n".join(_lines("backward_of_loss", cut.loss, cut, "n", origin)))
    parts.append(f"# --- cut: k of n examples, by the norms of {', '.join(gradients)} ---")
    parts.append("\n".join(_lines("backward", cut.compact, cut, "k", origin)))
    return "\n\n".join(parts) + "\n"


def _lines(
    name: str, gm: fx.GraphModule, cut: Cut, count: str, origin: Callable[[fx.Node], str]
) -> Iterator[str]:
    written = {match["name"]: line for line in gm.code.splitlines() if (match := _ASSIGNMENT.match(line))}
    inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    yield f"def {name}({', '.join(inputs)}):"
    last = ""
    for node in gm.graph.nodes:
        if node.op == "output":
            yield f"    return {_without_deletions(str(node.args[0]))}"
        elif node.name in written and node.op != "placeholder":
            where = origin(node)
            if where and where != last:
                yield f"    # {where}"
                last = where
            line = _without_deletions(written[node.name])
            yield f"{line}{_comment(node, cut, count)}"


def _without_deletions(line: str) -> str:
    """Without the part that frees values, and with aten's operators under their short names."""
    return line.partition(";  ")[0].rstrip().replace("torch.ops.aten.", "aten.")


def _comment(node: fx.Node, cut: Cut, count: str) -> str:
    shape = _shape(node, cut, count)
    return f"  # {shape}" if shape else ""


def _shape(node: fx.Node, cut: Cut, count: str) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f"[{', '.join(map(str, value.shape))}]".replace(str(cut.symbol), count)


def _origins(module: nn.Module) -> Callable[[fx.Node], str]:
    """A function from a node to the layer and the line it is the backward of; "" if that is not known."""
    # line of generated code -> path of the traced module -> node; blocks that are alike have lines alike
    made: dict[str, dict[str, fx.Node]] = {}
    for path, piece in module.named_modules():
        if isinstance(piece, TracedModule):
            by_name = {node.name: node for node in piece.fx_graphs[piece.training].nodes}
            for line in piece.code.splitlines():
                if match := _ASSIGNMENT.match(line):
                    made.setdefault(line.strip(), {})[path] = by_name[match["name"]]

    def origin(node: fx.Node) -> str:
        stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack")
        inside = module_in(stack)
        for frame in reversed(list(_FRAME.finditer(node.meta.get("stack_trace") or ""))):
            line = linecache.getline(frame["file"], int(frame["line"])).strip()
            alike = made.get(line, {})
            path = next((p for p in alike if f"{inside}.".startswith(f"{p}." if p else "")), None)
            if path is not None:
                traced = alike[path]
                where = source_line(traced.meta.get("stack_trace")) or source_line(node.meta["stack_trace"])
                return ", ".join(filter(None, (_layer(traced, path), where)))
        return ", ".join(filter(None, (inside, source_line(node.meta.get("stack_trace")))))

    return origin


def _layer(node: fx.Node, path: str) -> str:
    if META_KEY in node.meta:
        return str(node.meta[META_KEY].site.name)
    return ".".join(filter(None, (path, str(node.target) if node.op == "call_module" else "")))
