"""The frozen records of what a model's graphs hold: Site, with its Call, Operands and Region.

A graph node is read into a `Site` once; policy, rewrite and report look at the record, never at the
node's raw arguments. Nothing here computes anything beyond sizes that follow from the record itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxprop.ops.axes import Axes, Shape
from fxprop.ops.regions.table import REGIONS, RegionKind
from fxprop.ops.selections import SELECTIONS
from fxprop.settings import Select

# begins the `node` of a site that is none: a product in code without a graph, by its parameter
CALL = "call:"


@dataclass(frozen=True)
class Operand:
    """A tensor argument of a site: a node of the graph, or an attribute that the rewrite must fetch."""

    # name of the graph node that produces the tensor; None if it is an attribute
    node: str | None = None
    # qualified attribute name such as "layer1.0.conv1.weight"; None if it is a node
    attribute: str | None = None


@dataclass(frozen=True)
class Call:
    """How a site calls its operator: everything the rewrite needs, bound by name."""

    input: Operand
    weight: Operand
    bias: Operand | None
    # stride, padding, equation, ...: by the operator's keyword; an Operand where it is a tensor
    constants: Mapping[str, Any] = field(default_factory=dict)
    # torch.nn.functional.pad's `pad` and `mode`, applied to the input first (padding_mode != "zeros")
    pad: tuple[tuple[int, ...], str] | None = None


@dataclass(frozen=True)
class Region:
    """What follows a layer in the graph and can be rewritten with it: a row of the table, found there."""

    # the operator that stands for it, a key of `fxprop.ops.regions.table.REGIONS`
    name: str
    activation: str | None
    # graph nodes behind the layer's own; the last one gives the region's output
    nodes: tuple[str, ...]
    # the norm's qualified attribute name, its class, and what makes another like it; None if there is none
    norm: str | None = None
    norm_class: type | None = None
    norm_arguments: tuple[Any, ...] = ()

    @property
    def kind(self) -> RegionKind:
        """The row of the table."""
        return REGIONS[self.name]

    @property
    def label(self) -> str:
        """What the layer is rewritten with: "batch_norm + relu"."""
        return self.kind.label(self.activation)


@dataclass(frozen=True)
class Site:
    """One use of a conv or linear weight in a graph.

    >>> site = fxprop.layers(model, (x,))[0]
    >>> site.name, site.op, site.weight_shape, site.n("channel")
    ('conv1', 'conv2d', (64, 3, 7, 7), 64)
    """

    # qualified module name; "#2" is appended for a second use (design: site names)
    name: str
    # the sparse operator's name ("conv2d", "linear", "matmul", ...), or what a skipped node calls
    op: str
    # the graph node's name
    node: str
    # qualified name of the GraphModule that holds the node; "" where that is the model itself
    graph: str = ""
    # class name of the module, and of its bases up to nn.Module; empty for functional calls
    types: tuple[str, ...] = ()
    # why the site must not be rewritten; None if it may be
    skip: str | None = None
    call: Call | None = None
    region: Region | None = None
    # whether nothing else in the graph reads the input
    is_only_reader: bool = False
    # what there is to choose from, and the FLOPs; None where not even the weight's shape is known
    axes: Axes | None = None
    # x [N, C_in, *spatial] or [*, in_features]; None where unknown
    input_shape: Shape | None = None
    # as the operator takes it: [C_out, C_in/groups, *kernel], [out_features, in_features], ...
    weight_shape: Shape | None = None
    # [N, C_out, *spatial] or [*, out_features]; None where unknown
    output_shape: Shape | None = None
    # no other site upstream / downstream
    is_first: bool = False
    is_output: bool = False
    # the sites that its gradient comes from without passing another, by name; "" is the model's output.
    # None where not known
    behind: tuple[str, ...] | None = None
    # which gradients the dense backward computes here
    needs_grad_input: bool = True
    needs_grad_weight: bool = True
    # whether its input or weight is complex, which has no sparse backward: then it is skipped
    is_complex: bool = False
    # the user's line that made the node, "file.py:12"; None where not recorded
    source: str | None = None

    def __post_init__(self) -> None:
        if self.is_complex and self.skip is None:
            object.__setattr__(self, "skip", "complex tensors have no sparse backward")

    @property
    def type(self) -> str | None:
        """Class name of the site's module; None for a functional call."""
        return self.types[0] if self.types else None

    @property
    def is_node(self) -> bool:
        """Whether the site is a node of a graph; False for a product in code that has no graph."""
        return not self.node.startswith(CALL)

    @property
    def groups(self) -> int:
        """Parts of the weight that do not meet: conv groups, matrices of a batched product, experts."""
        return 1 if self.axes is None else self.axes.groups

    @property
    def out_channels(self) -> int | None:
        """Output channels or features of all groups together; None where unknown."""
        return None if self.axes is None else self.axes.channels

    @property
    def multiply_adds(self) -> int | None:
        """Of the forward; None where shapes are unknown."""
        return None if self.axes is None else self.axes.multiply_adds

    @property
    def can_be_row_sparse(self) -> bool:
        """Whether kept channels are rows of the weight, and the weight is a parameter itself."""
        if self.axes is None or self.call is None or not self.is_node:
            return False
        return self.axes.weight_rows and self.call.weight.attribute is not None

    def n(self, select: Select) -> int | None:
        """How many things `select` chooses from at this site; None if the shapes are not known.

        channel: C_out per group (C_out for depthwise); out_features. element: C_out times the output's
        spatial size; out_features. For others see `fxprop.ops.selections`.
        """
        return None if self.axes is None else SELECTIONS[select].n(self.axes)
