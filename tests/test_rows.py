"""select="row": whole examples of a convolution, whole rows of a product, chosen at run time."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxprop
from fxprop import ops
from fxprop.errors import OpError
from fxprop.policy import files as policy_files

KEEP = {"select": "row", "score": "l1"}


def offsets(*ends):
    return torch.tensor(ends, dtype=torch.int32)


# operator -> (sparse, dense, input's and weight's shapes, grad_output as [matrices, rows, entries])
CASES = {
    "linear": (ops.linear, F.linear, (5, 3, 4), (6, 4), lambda g: g.reshape(1, -1, 6)),
    "conv1d": (ops.conv1d, F.conv1d, (5, 4, 7), (6, 4, 3), lambda g: g.flatten(1)[None]),
    "conv2d": (ops.conv2d, F.conv2d, (4, 4, 6, 5), (6, 4, 3, 3), lambda g: g.flatten(1)[None]),
    "grouped": (
        lambda x, w, **keep: ops.conv2d(x, w, groups=2, stride=2, **keep),
        lambda x, w: F.conv2d(x, w, groups=2, stride=2),
        (4, 4, 6, 5),
        (6, 2, 3, 3),
        lambda g: g.flatten(1)[None],
    ),
    "depthwise": (
        lambda x, w, **keep: ops.conv2d(x, w, groups=4, **keep),
        lambda x, w: F.conv2d(x, w, groups=4),
        (4, 4, 6, 5),
        (4, 1, 3, 3),
        lambda g: g.flatten(1)[None],
    ),
    "transposed": (
        ops.conv_transpose2d,
        F.conv_transpose2d,
        (4, 3, 4, 4),
        (3, 5, 3, 3),
        lambda g: g.flatten(1)[None],
    ),
    "matmul": (ops.matmul, torch.matmul, (7, 3), (3, 5), lambda g: g[None]),
    "left": (
        lambda x, w, **keep: ops.matmul(w, x, weight="left", **keep),
        lambda x, w: w @ x,
        (3, 7),
        (5, 3),
        lambda g: g.t()[None],
    ),
    "batched": (ops.matmul, torch.matmul, (2, 7, 3), (2, 3, 5), lambda g: g),
    "experts": (
        lambda x, w, **keep: ops.grouped_mm(x, w, offs=offsets(3, 3, 8), **keep),
        lambda x, w: F.grouped_mm(x, w, offs=offsets(3, 3, 8)),
        (8, 16),
        (3, 16, 16),
        lambda g: g[None],
    ),
}


def mask_by_hand(rows, k):
    """0/1 for [matrices, rows, entries]: the k rows of each matrix with the largest sums of magnitudes."""
    mask = torch.zeros_like(rows)
    for of, matrix in zip(mask, rows, strict=True):
        sums = [row.abs().sum().item() for row in matrix]
        for best in sorted(range(len(sums)), key=lambda i: -sums[i])[:k]:
            of[best] = 1
    return mask


def both(name, keep_k, k, seed=0, shift=0):
    """(gradients by the operator, dense gradients with the rows masked by hand)."""
    sparse, dense, x_shape, w_shape, as_rows = CASES[name]
    torch.manual_seed(seed)
    dtype = torch.float32 if name == "experts" else torch.float64
    x = torch.randn(x_shape, dtype=dtype, requires_grad=True)
    w = torch.randn(w_shape, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(dense(x, w))
    y = sparse(x, w, k=keep_k, **KEEP)
    assert torch.equal(y, dense(x, w))
    got = torch.autograd.grad(y, (x, w), grad)
    masked = grad.clone()
    rows = as_rows(masked)
    mask = mask_by_hand(rows, k).roll(shift, 1)
    # the layout's inverse is autograd's own
    probe = torch.ones_like(grad, requires_grad=True)
    whole = torch.autograd.grad(as_rows(probe), probe, mask)[0]
    want = torch.autograd.grad(dense(x, w), (x, w), grad * whole)
    return got, want


def close(got, want):
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("k", "count"), [(1, 1), (2, 2), (0.5, None), (0.01, 1), (100, None)])
def test_gradients_are_those_of_the_kept_rows(name, k, count):
    rows = CASES[name][4](CASES[name][1](torch.zeros(CASES[name][2]), torch.zeros(CASES[name][3]))).shape[1]
    count = count or (rows if k == 100 else math.floor(k * rows + 0.5))
    assert close(*both(name, k, count))


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_can_fail(name):
    assert not close(*both(name, 1, 1, shift=1))


@given(share=st.floats(0.01, 1.0), n=st.integers(1, 9), score=st.sampled_from(["l1", "l2", "random"]))
def test_a_share_of_however_many_there_are(share, n, score):
    x = torch.randn(n, 3, requires_grad=True)
    w = torch.randn(4, 3)
    ops.linear(x, w, k=share, select="row", score=score).backward(torch.randn(n, 4))
    kept = sum(bool(row.any()) for row in x.grad)
    assert kept == max(1, math.floor(share * n + 0.5))


@pytest.mark.parametrize("bias_grad", ["full", "selected"])
def test_bias(bias_grad):
    x, w, b = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    grad = torch.randn(5, 4)
    ops.linear(x, w, b, k=2, select="row", bias_grad=bias_grad).backward(grad)
    kept = grad * mask_by_hand(grad[None], 2)[0]
    torch.testing.assert_close(b.grad, (grad if bias_grad == "full" else kept).sum(0))


@pytest.mark.parametrize("k", [0.0, 1.5, True, 0, -1])
def test_a_share_that_is_none(k):
    x, w = torch.randn(5, 3), torch.randn(4, 3)
    with pytest.raises(OpError, match="expected an integer of at least 1"):
        ops.linear(x, w, k=k, select="row")


def test_a_share_is_for_rows_alone():
    with pytest.raises(OpError, match=r"k=0\.5: expected an integer"):
        ops.linear(torch.randn(5, 3), torch.randn(4, 3), k=0.5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        return self.head(self.fc(x.flatten(2).transpose(1, 2)).relu().mean(1))


def test_a_policy_writes_the_share_and_the_report_counts_it():
    model, x = Net(), torch.randn(8, 3, 6, 6, requires_grad=True)
    policy = fxprop.Policy(keep=0.25, select="row", when="always", round_to=4, score_fraction=0.5)
    gm, report = fxprop.transform(model, policy, (x,))
    assert "fxprop_ops_conv2d" in gm.code
    assert "k = 0.25, select = 'row', score = 'l1'" in gm.code
    conv, fc, _ = report.layers
    assert (conv.k, conv.n, fc.k, fc.n) == (2, 8, 72, 288)
    assert conv.executed.total * 4 == conv.dense.total
    assert any("round_to=4" in text for text in conv.left_out)
    assert any("score_fraction=0.5" in text for text in conv.left_out)
    # 8 magnitudes and as many sums in each of 36 places and 8 channels, and 8 candidates
    assert conv.select_ops == 2 * 8 * 36 * 8 + 8


def test_the_executed_flops_are_those_that_torch_counts():
    x = torch.randn(8, 3, 6, 6, requires_grad=True)
    gm, report = fxprop.transform(Net(), fxprop.Policy(keep=0.25, select="row", when="always"), (x,))
    loss = gm(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == report.totals.executed + (report.other or 0)


def test_another_batch_and_a_file_keep_the_share(tmp_path):
    policy = fxprop.Policy(keep=0.5, select="row", when="always")
    file = tmp_path / "policy.toml"
    file.write_text(policy_files.to_toml(policy), encoding="utf-8")
    gm, _ = fxprop.transform(Net(), file, (torch.randn(8, 3, 6, 6),))
    x = torch.randn(6, 3, 6, 6, requires_grad=True)
    gm(x).sum().backward()
    assert sum(bool(example.any()) for example in x.grad) <= 3
    fxprop.set_keep(gm, 0.25)
    assert "k = 0.25" in gm.code


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    gm, _ = fxprop.transform(
        Net(), fxprop.Policy(keep=0.5, select="row", when="always"), (torch.randn(4, 3, 6, 6),)
    )
    compiled = torch.compile(gm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (4, 6):
        x = torch.randn(n, 3, 6, 6)
        want, got = (x.clone().requires_grad_() for _ in range(2))
        gm(want).square().sum().backward()
        compiled(got).square().sum().backward()
        torch.testing.assert_close(got.grad, want.grad)
