"""Inputs of the sparse operators: some that are always tried, and strategies that draw others."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

LAYOUTS = ("contiguous", "channels_last", "transposed")
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Sample:
    """Shapes of the operands, constants of the call, and how the tensors lie in memory.

    "transposed" hands over a transposed view of the input; the leaf itself is contiguous.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    bias: tuple[int, ...] | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"
    # channels of a batch-norm behind the product, and whether it has a gamma and beta
    norm: int | None = None
    affine: bool = True

    def leaves(self, dtype, needs=(True, True, True), seed=0):
        """The same tensors at every call: parameters by name, and the norm that has two of them."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {"input": self.input, "weight": self.weight, "bias": self.bias}
        leaves: dict[str, Any] = {}
        for (name, shape), need in zip(shapes.items(), needs, strict=True):
            if shape is None:
                leaves[name] = None
                continue
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if self.layout == "channels_last" and values.dim() in LAST:
                values = values.contiguous(memory_format=LAST[values.dim()])
            leaves[name] = nn.Parameter(values, requires_grad=need)
        if self.norm is not None:
            norm = NORMS[len(self.weight) - 2](self.norm, affine=self.affine, dtype=dtype)
            for parameter in norm.parameters():
                parameter.data = torch.randn(self.norm, generator=generator).to(dtype)
            leaves["norm"] = norm
            leaves |= {"gamma": norm.weight, "beta": norm.bias} if self.affine else {}
        return leaves

    def arranged(self, leaves):
        """`leaves` as the call gets them."""
        if self.layout != "transposed" or len(self.input) < 3:
            return leaves
        return {**leaves, "input": leaves["input"].transpose(0, 1)}

    def coefficients(self, output):
        """What the output is multiplied with: the gradient that a backward begins with.

        Values that are well apart in the half types, so that rounding cannot change which are larger.
        """
        generator = torch.Generator().manual_seed(9)
        if output.dtype in (torch.float64, torch.float32):
            return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        count = output.numel()
        order = torch.randperm(count, generator=generator)
        signs = torch.randn(count, generator=generator).sign()
        return (signs * torch.logspace(-1, 1, count)[order]).view(output.shape).to(output.dtype)


def ints(low, high, dims):
    """One number for each dimension, or one for all."""
    return st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * dims))


@st.composite
def convolutions(draw, dims):
    groups = draw(st.integers(1, 4))
    per_group_in, per_group_out = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    padding = draw(st.one_of(ints(0, 2, dims), st.sampled_from(["same", "valid"])))
    batch = draw(st.sampled_from([None, 0, 1, 2, 3]))
    constants = {
        "stride": 1 if padding == "same" else draw(ints(1, 2, dims)),
        "padding": padding,
        "dilation": draw(ints(1, 2, dims)),
        "groups": groups,
    }
    spatial = draw(st.tuples(*[st.integers(5, 7)] * dims))
    out = groups * per_group_out
    return Sample(
        (*(() if batch is None else (batch,)), groups * per_group_in, *spatial),
        (out, per_group_in, *draw(st.tuples(*[st.integers(1, 3)] * dims))),
        draw(st.sampled_from([None, (out,)])),
        constants,
        draw(st.sampled_from(LAYOUTS[:2])),
    )


@st.composite
def transposed_convolutions(draw, dims):
    groups, per_group = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    stride = draw(st.integers(1, 2))
    constants = {
        "stride": stride,
        "padding": draw(st.integers(0, 1)),
        "output_padding": stride - 1,
        "dilation": 1,
        "groups": groups,
    }
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return Sample(
        (*batch, 4, *[4] * dims),
        (4, per_group, *[draw(st.integers(2, 3))] * dims),
        draw(st.sampled_from([None, (per_group * groups,)])),
        constants,
        draw(st.sampled_from(LAYOUTS[:2])),
    )


@st.composite
def linears(draw, activation=False):
    rows = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    n_in, out = draw(st.integers(1, 6)), draw(st.integers(2 if activation else 1, 7))
    names = ["relu", "gelu", "gelu_tanh", "silu"]
    return Sample(
        (*rows, n_in),
        (out, n_in),
        draw(st.sampled_from([None, (out,)])),
        {"activation": draw(st.sampled_from(names))} if activation else {},
        draw(st.sampled_from(["contiguous", "transposed"])),
    )


@st.composite
def matmuls_right(draw):
    rows, n_in = draw(st.lists(st.integers(1, 4), max_size=3)), draw(st.integers(1, 6))
    layout = draw(st.sampled_from(["contiguous", "transposed"]))
    return Sample((*rows, n_in), (n_in, draw(st.integers(2, 7))), layout=layout)


@st.composite
def matmuls_left(draw):
    batch, n_in = draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 5))
    return Sample((*batch, n_in, draw(st.integers(1, 5))), (draw(st.integers(2, 6)), n_in))


@st.composite
def matmuls_batched(draw):
    batch, n_in = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return Sample((batch, draw(st.integers(1, 5)), n_in), (batch, n_in, draw(st.integers(2, 6))))


@st.composite
def addmms(draw):
    rows, n_in, out = (draw(st.integers(1, 5)) for _ in range(3))
    scales = draw(st.sampled_from([{}, {"beta": 0.5, "alpha": 2.0}, {"beta": 2}, {"alpha": -1.5}]))
    return Sample((rows, n_in), (n_in, out), draw(st.sampled_from([(out,), (rows, out), (1, out)])), scales)


# equation, shape of the input, of the weight, and how many of the output's last dimensions are features
EQUATIONS = [
    ("btd,df->btf", (2, 3, 4), (4, 5)),
    ("btd,dhk->bthk", (2, 3, 4), (4, 2, 3)),
    ("bthk,hkd->btd", (2, 3, 2, 3), (2, 3, 5)),
    ("bd, df", (3, 4), (4, 5)),
]


@st.composite
def einsums(draw):
    equation, of_input, of_weight = draw(st.sampled_from(EQUATIONS))
    left, arrow, output = equation.partition("->")
    side = draw(st.sampled_from(["right", "left"])) if arrow else "right"
    if side == "left":
        equation = ",".join(reversed(left.split(","))) + arrow + output
    of_input = (draw(st.integers(1, 4)), *of_input[1:])
    return Sample(of_input, of_weight, constants={"equation": equation, "weight": side})


@st.composite
def grouped_products(draw):
    # rows of 16 bytes at least, in every type
    sizes = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any)))
    n_in, out = (draw(st.sampled_from([8, 16])) for _ in range(2))
    return Sample((sum(sizes), n_in), (len(sizes), n_in, out), constants={"sizes": sizes})


@st.composite
def normed_convolutions(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    out = groups * draw(st.integers(2, 4))
    return Sample(
        (draw(st.integers(2, 3)), 2 * groups, *[draw(st.integers(4, 5))] * dims),
        (out, 2, *[draw(st.sampled_from([1, 3]))] * dims),
        draw(st.sampled_from([None, (out,)])),
        {
            "stride": draw(st.integers(1, 2)),
            "padding": draw(st.sampled_from([0, 1])),
            "groups": groups,
            "activation": draw(st.sampled_from([None, "relu"])),
        },
        draw(st.sampled_from(LAYOUTS[:2])),
        norm=out,
        affine=draw(st.booleans()),
    )


def in_layouts(sample, *layouts):
    """`sample` as it is, and in each of `layouts`."""
    return [sample, *(replace(sample, layout=layout) for layout in layouts)]
