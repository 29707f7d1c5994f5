"""Scores in half types and of large gradients, and ties; tests/test_operators.py has the operators."""

import pytest
import torch

from fxprop import ops
from fxprop.ops.scores import get_score


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_half_types_score_in_float32(op, dtype):
    """In 16 bits the sums of these channels are equal, or overflow; in float32 the last ones win."""
    n, rows, k = 8, 4096, 2
    grad = torch.full((rows, n), 40.0)
    grad[0, -k:] += 8.0
    grad = grad.to(dtype)
    weight = torch.ones(n, 3, dtype=dtype, requires_grad=True)
    x = torch.ones(rows, 3, dtype=dtype)
    if op == "linear":
        ops.linear(x, weight, k=k).backward(grad)
        kept = weight.grad.abs().sum(1).nonzero().flatten()
    else:
        weight4 = weight.detach().view(n, 3, 1, 1).requires_grad_()
        ops.conv2d(x[..., None, None], weight4, k=k).backward(grad[..., None, None])
        kept = weight4.grad.flatten(1).abs().sum(1).nonzero().flatten()
        assert weight4.grad.dtype == dtype
    assert kept.tolist() == [n - 2, n - 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3000, 200), (5, 70, 60, 50), (1, 4, 300, 300), (0, 6, 2, 2)])
def test_scores_of_gradients_larger_than_the_cache(shape, dtype):
    grad = torch.randn(shape).to(dtype)
    dims = tuple(dim for dim in range(len(shape)) if dim != 1)
    for name, order in (("l1", 1), ("l2", 2)):
        expected = torch.linalg.vector_norm(grad.double(), order, dims)
        scores = get_score(name)(grad, dims)
        assert scores.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=0)


def test_ties_are_broken_as_topk_breaks_them():
    grad = torch.ones(4, 9)
    weight = torch.ones(9, 3, requires_grad=True)
    ops.linear(torch.ones(4, 3), weight, k=4).backward(grad)
    kept = weight.grad.sum(1).nonzero().flatten().tolist()
    assert kept == sorted(grad.abs().sum(0).topk(4).indices.tolist())
