"""The sparse operators, one record each: what they mirror, what is masked by hand, what they take.

In the manner of PyTorch's OpInfo: `tests/test_operators.py` goes through the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import oracle
import samples
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from samples import Sample, in_layouts

from fxprop import ops

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    # as users write it, not as the operator has it
    "silu": lambda x: x * torch.sigmoid(x),
}
LEAST = "least"  # a score that users register: the features that say least; it hides what is not finite


def _least(grad, dims):
    return -torch.linalg.vector_norm(grad.nan_to_num(1e9, 1e9, 1e9), 1, dims, dtype=torch.float64)


if LEAST not in ops.score_names():
    ops.register_score(LEAST, _least)


@dataclass(frozen=True)
class Supports:
    """What an operator takes beside k, select, score and score_fraction."""

    bias_grad: bool = True
    weight_grad: bool = True
    norm_grad: bool = False
    chained: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOATS
    # the type that torch.compile has the dense operator in
    compiled: torch.dtype = torch.float64

    def settings(self):
        """Keywords and the values to try; what comes first is the default."""
        taken: dict[str, tuple[Any, ...]] = {
            "select": ("channel", "element"),
            "score": ("l1", "l2", LEAST),
            "score_fraction": (1.0, 0.2),
        }
        if self.bias_grad:
            taken["bias_grad"] = ("full", "selected")
        if self.weight_grad:
            taken["weight_grad"] = ("dense", "row_sparse")
        if self.norm_grad:
            taken["norm_grad"] = ("full", "kept")
        return taken

    def defaults(self, **others):
        """The keywords' defaults, but for `others`."""
        return {name: values[0] for name, values in self.settings().items()} | others

    def drawn(self):
        """Any value for each keyword."""
        return st.fixed_dictionaries({n: st.sampled_from(v) for n, v in self.settings().items()})

    def missing(self):
        """Keywords of other operators, which this one refuses."""
        values = {"bias_grad": "full", "weight_grad": "dense", "norm_grad": "full", "chained": False}
        return {name: value for name, value in values.items() if not getattr(self, name)}


Tensors = dict[str, Any]


@dataclass(frozen=True)
class Operator:
    """`sparse` and `dense` take (tensors, constants); `product` is the product alone, without the bias.

    `features` and `examples` say which positions of the product's gradient are chosen from, as
    `oracle.mask` takes them; both get (numbers, sample).
    """

    name: str
    sparse: Callable[..., torch.Tensor]
    dense: Callable[[Tensors, dict[str, Any]], torch.Tensor]
    product: Callable[[Tensors, dict[str, Any]], torch.Tensor]
    features: Callable[[torch.Tensor, Sample], list[torch.Tensor]]
    examples: Callable[[torch.Tensor, Sample], torch.Tensor]
    samples: list[Sample]
    drawn: Any
    biased: Callable[[torch.Tensor, Tensors, dict[str, Any]], torch.Tensor] = lambda y, t, c: (
        y if t["bias"] is None else y + t["bias"]
    )
    after: Callable[[torch.Tensor, Tensors, dict[str, Any]], torch.Tensor] = lambda y, t, c: y
    # another gradient to score than the product's own: (its gradient, output, y, tensors, keep)
    scored: Callable[..., torch.Tensor | None] = lambda *_: None
    supports: Supports = field(default_factory=Supports)

    def __str__(self):
        return self.name

    def run(self, sample, leaves, **keep):
        """The sparse operator's output; the dense one's without `keep`."""
        given = sample.arranged(leaves)
        if not keep:
            return self.dense(given, sample.constants)
        return self.sparse(given, sample.constants, **keep)


def without_activation(constants):
    return {name: value for name, value in constants.items() if name != "activation"}


# --- convolutions ----------------------------------------------------------------------------------------


def convolution(name, dims, table_of, drawn, **supports):
    sparse, dense = getattr(ops, name), getattr(F, name)

    def batched(numbers):
        return numbers if numbers.dim() == dims + 2 else numbers[None]

    return Operator(
        name,
        lambda t, c, **keep: sparse(t["input"], t["weight"], t["bias"], **c, **keep),
        lambda t, c: dense(t["input"], t["weight"], t["bias"], **c),
        lambda t, c: dense(t["input"], t["weight"], None, **c),
        lambda numbers, sample: oracle.runs_of_channels(sample.constants.get("groups", 1))(
            batched(numbers)
        ),
        lambda numbers, sample: batched(numbers).flatten(1),
        table_of(dims),
        drawn(dims),
        biased=lambda y, t, c: y if t["bias"] is None else y + t["bias"].view(-1, *[1] * dims),
        supports=Supports(**supports),
    )


def convolutions(dims):
    cubes = [6 - dims] * dims
    plain = Sample((3, 4, *cubes), (8, 4, *[3] * dims), (8,), {"padding": 1})
    return [
        *in_layouts(plain, *(["channels_last"] if dims > 1 else [])),
        Sample((2, 4, *cubes), (8, 2, *[3] * dims), None, {"groups": 2, "stride": 2, "padding": 1}),
        Sample((2, 6, *cubes), (6, 1, *[3] * dims), (6,), {"groups": 6, "dilation": 2, "padding": "same"}),
        Sample((6, *cubes), (10, 6, *[1] * dims), (10,)),
        *in_layouts(
            Sample((3, 6, *cubes), (10, 6, *[1] * dims), (10,), {"stride": [1] * (dims - 1) + [2]}),
            *(["channels_last"] if dims > 1 else []),
        ),
        Sample((0, 4, *cubes), (8, 4, *[3] * dims), (8,)),
    ]


def transposed_convolutions(dims):
    cubes = [4] * dims
    plain = Sample((3, 4, *cubes), (4, 8, *[3] * dims), (8,), {"padding": 1})
    return [
        *in_layouts(plain, *(["channels_last"] if dims > 1 else [])),
        Sample((2, 4, *cubes), (4, 4, *[3] * dims), None, {"groups": 2, "stride": 2, "output_padding": 1}),
        Sample((2, 6, *cubes), (6, 1, *[2] * dims), (6,), {"groups": 6, "dilation": 2}),
        Sample((4, *cubes), (4, 6, *[2] * dims), (6,), {"stride": 2}),
    ]


# --- one call for several layers -------------------------------------------------------------------------


def _conv(t, c):
    dense = (F.conv1d, F.conv2d, F.conv3d)[t["weight"].dim() - 3]
    return dense(t["input"], t["weight"], None, **without_activation(c))


def _conv_norm_dense(t, c):
    dense = (F.conv1d, F.conv2d, F.conv3d)[t["weight"].dim() - 3]
    y = t["norm"](dense(t["input"], t["weight"], t["bias"], **without_activation(c)))
    return ACTIVATIONS[c["activation"]](y)


def _norm_scored(coefficients, output, y, leaves, keep):
    if keep.score_fraction == 1:
        return None
    # the ReLU's output is zero where it passes nothing on
    behind = coefficients * (output != 0)
    return oracle.of_first_examples(behind, y.detach(), leaves.get("gamma"), leaves["norm"].eps, keep)


CONV_BATCH_NORM = Operator(
    "conv_batch_norm",
    lambda t, c, **keep: ops.conv_batch_norm(t["input"], t["weight"], t["bias"], t["norm"], **c, **keep),
    _conv_norm_dense,
    _conv,
    lambda numbers, sample: oracle.runs_of_channels(sample.constants["groups"])(numbers),
    lambda numbers, sample: numbers.flatten(1),
    [
        *in_layouts(
            Sample(
                (5, 3, 4, 4),
                (10, 3, 3, 3),
                (10,),
                {"groups": 1, "padding": 1, "activation": "relu"},
                norm=10,
            ),
            "channels_last",
        ),
        Sample((4, 4, 6), (8, 2, 3), None, {"stride": 2, "groups": 2, "activation": None}, norm=8),
        Sample((3, 2, 4, 4, 4), (6, 2, 3, 3, 3), (6,), {"groups": 1, "activation": "relu"}, norm=6),
        Sample((3, 6, 4, 4), (6, 1, 3, 3), (6,), {"groups": 6, "activation": "relu"}, norm=6),
    ],
    samples.normed_convolutions(),
    biased=lambda y, t, c: y if t["bias"] is None else y + t["bias"].view(-1, *[1] * (y.dim() - 2)),
    after=lambda y, t, c: ACTIVATIONS[c["activation"]](
        F.batch_norm(y, None, None, t.get("gamma"), t.get("beta"), training=True)
    ),
    scored=_norm_scored,
    supports=Supports(bias_grad=False, norm_grad=True, chained=True),
)


def rows_of(numbers, sample):
    return [numbers.reshape(-1, 1, numbers.shape[-1])]


def each_row(numbers, sample):
    return numbers.reshape(-1, numbers.shape[-1])


LINEAR_ACTIVATION = Operator(
    "linear_activation",
    lambda t, c, **keep: ops.linear_activation(t["input"], t["weight"], t["bias"], **c, **keep),
    # bit-equal to what torch calls silu
    lambda t, c: (F.silu if c["activation"] == "silu" else ACTIVATIONS[c["activation"]])(
        F.linear(t["input"], t["weight"], t["bias"])
    ),
    lambda t, c: F.linear(t["input"], t["weight"]),
    rows_of,
    each_row,
    [
        Sample((3, 5, 6), (8, 6), (8,), {"activation": "gelu"}),
        Sample((4, 6), (8, 6), None, {"activation": "relu"}),
        Sample((2, 3, 6), (8, 6), (8,), {"activation": "gelu_tanh"}, "transposed"),
        Sample((6,), (8, 6), (8,), {"activation": "silu"}),
    ],
    samples.linears(activation=True),
    after=lambda y, t, c: ACTIVATIONS[c["activation"]](y),
)

# --- products --------------------------------------------------------------------------------------------

NO_BIAS = Supports(bias_grad=False, weight_grad=False)

LINEAR = Operator(
    "linear",
    lambda t, c, **keep: ops.linear(t["input"], t["weight"], t["bias"], **keep),
    lambda t, c: F.linear(t["input"], t["weight"], t["bias"]),
    lambda t, c: F.linear(t["input"], t["weight"]),
    rows_of,
    each_row,
    [
        *in_layouts(Sample((3, 5, 6), (8, 6), (8,)), "transposed"),
        Sample((4, 6), (8, 6), None),
        Sample((6,), (8, 6), (8,)),
        Sample((2, 0, 6), (8, 6), (8,)),
    ],
    samples.linears(),
)


def _matmul(name, side, features, examples, table, drawn):
    def order(t):
        return (t["input"], t["weight"]) if side == "right" else (t["weight"], t["input"])

    def dense(t, c):
        return torch.matmul(*order(t))

    return Operator(
        name,
        lambda t, c, **keep: ops.matmul(*order(t), weight=side, **keep),
        dense, dense, features, examples, table, drawn, supports=NO_BIAS,
    )  # fmt: skip


def _addmm(t, c, call, **keep):
    return call(t["bias"], t["input"], t["weight"], **c, **keep)


def _einsum(t, c, call, **keep):
    right = c.get("weight", "right") == "right"
    operands = (t["input"], t["weight"]) if right else (t["weight"], t["input"])
    return call(c["equation"], *operands, **keep)


def _of_equation(numbers, sample):
    """[rows, features] of an einsum's output, whose features come last in all of the samples."""
    dims = 2 if "bthk" in sample.constants["equation"].partition("->")[2] else 1
    return numbers.flatten(-dims).flatten(0, -2)


def _offsets(c):
    return torch.tensor(c["sizes"]).cumsum(0).to(torch.int32)


def _experts(t, c):
    parts = torch.split(t["input"], c["sizes"])
    return torch.cat([part @ weight for part, weight in zip(parts, t["weight"], strict=True)])


OPERATORS = [
    *(
        convolution(f"conv{dims}d", dims, convolutions, samples.convolutions, chained=True)
        for dims in (1, 2, 3)
    ),
    *(
        convolution(
            f"conv_transpose{dims}d",
            dims,
            transposed_convolutions,
            samples.transposed_convolutions,
            weight_grad=False,
        )
        for dims in (1, 2, 3)
    ),
    LINEAR,
    _matmul(
        "matmul of an input and a weight",
        "right",
        rows_of,
        each_row,
        [*in_layouts(Sample((3, 5, 6), (6, 8)), "transposed"), Sample((6,), (6, 8))],
        samples.matmuls_right(),
    ),
    _matmul(
        "matmul of a weight and an input",
        "left",
        lambda n, s: rows_of(n.mT, s),
        lambda n, s: each_row(n.mT, s),
        [Sample((3, 6, 5), (8, 6)), Sample((6, 5), (8, 6))],
        samples.matmuls_left(),
    ),
    _matmul(
        "matmul of a batch of weights",
        "right",
        lambda n, s: [of_one[:, None] for of_one in n],
        each_row,
        [Sample((3, 5, 6), (3, 6, 8)), Sample((1, 5, 6), (1, 6, 8))],
        samples.matmuls_batched(),
    ),
    Operator(
        "addmm",
        partial(_addmm, call=ops.addmm),
        partial(_addmm, call=torch.addmm),
        lambda t, c: c.get("alpha", 1) * (t["input"] @ t["weight"]),
        rows_of,
        each_row,
        [Sample((7, 4), (4, 8), (8,)), Sample((7, 4), (4, 8), (7, 8), {"beta": 0.5, "alpha": 2.0})],
        samples.addmms(),
        biased=lambda y, t, c: y + c.get("beta", 1) * t["bias"],
        supports=Supports(weight_grad=False),
    ),
    Operator(
        "einsum",
        lambda t, c, **keep: _einsum(t, c, ops.einsum, weight=c.get("weight", "right"), **keep),
        lambda t, c: _einsum(t, c, torch.einsum),
        lambda t, c: _einsum(t, c, torch.einsum),
        lambda n, s: [_of_equation(n, s)[:, None]],
        _of_equation,
        [Sample(i, w, constants={"equation": e}) for e, i, w in samples.EQUATIONS],
        samples.einsums(),
        supports=NO_BIAS,
    ),
    Operator(
        "grouped_mm",
        lambda t, c, **keep: ops.grouped_mm(t["input"], t["weight"], offs=_offsets(c), **keep),
        lambda t, c: F.grouped_mm(t["input"], t["weight"], offs=_offsets(c)),
        _experts,
        lambda n, s: [part[:, None] for part in torch.split(n, s.constants["sizes"])],
        each_row,
        [Sample((12, 16), (3, 16, 8), constants={"sizes": sizes}) for sizes in ((3, 4, 5), (6, 0, 6))],
        samples.grouped_products(),
        supports=Supports(bias_grad=False, weight_grad=False, dtypes=FLOATS[1:], compiled=torch.bfloat16),
    ),
    CONV_BATCH_NORM,
    LINEAR_ACTIVATION,
]
