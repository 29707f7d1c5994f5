"""What the products refuse, and what they cost; tests/test_operators.py has their gradients."""

import pytest
import torch

import fxprop
from fxprop import ops
from fxprop.errors import OpError
from fxprop.ops.axes import Shapes
from fxprop.ops.catalogue import OPERATORS


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ops.matmul(torch.ones(3, 4), torch.ones(4), k=1), "the weight has no output features"),
        (
            lambda: ops.matmul(torch.ones(2, 3, 4), torch.ones(1, 4, 5), k=1),
            "sizes differ, and broadcasting",
        ),
        (lambda: ops.einsum("...i,io->...o", torch.ones(3, 4), torch.ones(4, 5), k=1), "every index named"),
        (
            lambda: ops.einsum("ii,io->io", torch.ones(4, 4), torch.ones(4, 5), k=1),
            "repeated in one operand",
        ),
        (
            lambda: ops.grouped_mm(torch.ones(2, 8, 8), torch.ones(2, 8, 8), offs=torch.ones(1), k=1),
            "expected .rows",
        ),
        (
            lambda: ops.einsum("nd,of->no", torch.ones(2, 3), torch.ones(4, 3), k=1),
            "an index is summed in one operand alone",
        ),
    ],
)
def test_what_a_product_cannot_take(call, match):
    with pytest.raises(OpError, match=match):
        call()


def loops(op, x, w, constants):
    """Multiply-adds counted one by one."""
    if op == "addmm":
        return sum(1 for _ in range(x[0]) for _ in range(w[0]) for _ in range(w[1]))
    if op == "conv_transpose1d":
        groups = constants["groups"]
        per_input = sum(1 for _ in range(w[1]) for _ in range(w[2]))
        assert w[0] % groups == 0
        return sum(per_input for _ in range(x[0]) for _ in range(x[1]) for _ in range(x[2]))
    raise AssertionError(op)


@pytest.mark.parametrize(
    ("op", "x", "w", "constants"),
    [("addmm", (3, 4), (4, 5), {}), ("conv_transpose1d", (2, 4, 6), (4, 3, 5), {"groups": 2})],
)
def test_multiply_adds_by_loops(op, x, w, constants):
    assert OPERATORS[op].axes(Shapes(x, w, None, constants)).multiply_adds == loops(op, x, w, constants)


def test_public_operators_are_documented():
    for name in ops.__all__:
        assert getattr(fxprop.ops, name).__doc__
