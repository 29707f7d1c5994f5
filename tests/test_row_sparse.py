"""Row-sparse weight gradients: the dense ones' values, in a form that optimizers pay less for."""

import copy

import pytest
import torch
from torch import nn

import fxprop
from fxprop.errors import PolicyError


def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 10),
    ).double()  # fmt: skip


def transformed(of, weight_grad, **settings):
    policy = fxprop.Policy(keep=0.25, when="always", weight_grad=weight_grad, **settings)
    return fxprop.transform(of, policy, (torch.empty(4, 3, 8, 8, dtype=torch.float64),))


def step(module, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()


def test_every_kind_of_layer_is_row_sparse_in_a_model():
    gm, report = transformed(model(), "row_sparse")
    rewritten = [layer for layer in report.layers if layer.status == "rewritten"]
    assert [layer.weight_grad for layer in rewritten] == ["row_sparse"] * 4
    assert "row-sparse weight gradient" in str(report)
    assert "weight_grad = 'row_sparse'" in gm.code
    step(gm, torch.optim.SGD(gm.parameters(), lr=0.1))
    gradients = [gm.get_parameter(f"{i}.weight").grad for i in (0, 3, 4, 7)]
    assert all(grad.is_sparse for grad in gradients)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_do_the_same_steps(optimizer):
    torch.manual_seed(0)
    first = model()
    second = copy.deepcopy(first)
    dense, sparse = transformed(first, "dense")[0], transformed(second, "row_sparse")[0]
    one, other = optimizer(dense.parameters(), lr=0.1), optimizer(sparse.parameters(), lr=0.1)
    for seed in range(5):
        step(dense, one, seed)
        step(sparse, other, seed)
    for a, b in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_adam_moves_the_kept_rows_only():
    gm, _ = transformed(model(), "row_sparse")
    weight = gm.get_parameter("7.weight")
    before = weight.detach().clone()
    step(gm, torch.optim.SparseAdam([weight], lr=0.1))
    assert (weight != before).flatten(1).any(1).sum() == 4


def test_accumulation_of_several_backwards():
    torch.manual_seed(0)
    first = model()
    grads = []
    for weight_grad in ("dense", "row_sparse"):
        gm, _ = transformed(copy.deepcopy(first), weight_grad)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            gm(torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)).square().mean().backward()
        grads.append([p.grad.to_dense() for p in gm.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast():
    linear = nn.Linear(64, 32)
    gm, _ = fxprop.transform(
        nn.Sequential(linear, nn.Linear(32, 2)), fxprop.Policy(keep=0.1, weight_grad="row_sparse", when="always"),
        (torch.empty(4, 64),),
    )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gm(torch.randn(4, 64)).float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    assert linear.weight.grad.is_sparse


def test_products_that_have_no_rows_stay_dense():
    gm, report = fxprop.transform(
        nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)),
        fxprop.Policy(keep=0.25, weight_grad="row_sparse", when="always"),
        (torch.empty(2, 4, 8, 8),),
    )
    assert [layer.weight_grad for layer in report.layers] == ["dense", "row_sparse", None]
    gm(torch.randn(2, 4, 8, 8)).sum().backward()
    assert not gm.get_parameter("0.weight").grad.is_sparse


def test_elements_stay_dense():
    _, report = fxprop.transform(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)),
        fxprop.Policy(keep=0.25, select="element", weight_grad="row_sparse", when="always"),
        (torch.empty(2, 4),),
    )
    assert report.layers[0].weight_grad == "dense"


def test_a_shared_weight_adds_up():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.out(self.fc(self.fc(x).tanh()))

    twice = Twice().double()
    x = torch.randn(4, 16, dtype=torch.float64)
    grads = []
    for weight_grad in ("dense", "row_sparse"):
        policy = fxprop.Policy(keep=0.25, weight_grad=weight_grad, when="always")
        gm, _ = fxprop.transform(copy.deepcopy(twice), policy, (x,))
        gm(x).square().sum().backward()
        grads.append(gm.get_parameter("fc.weight").grad.to_dense())
    torch.testing.assert_close(*grads)


def test_compiled_backward_is_dense(tmp_path):
    linear = nn.Linear(16, 16)
    compiled = torch.compile(lambda x: fxprop.ops.linear(x, linear.weight, k=2, weight_grad="row_sparse"))
    compiled(torch.randn(4, 16)).sum().backward()
    assert not linear.weight.grad.is_sparse
    assert (linear.weight.grad != 0).any(1).sum() == 2


def test_bad_values_are_named():
    with pytest.raises(PolicyError, match="weight_grad='rows': expected one of dense, row_sparse"):
        fxprop.Policy(keep=0.1, weight_grad="rows")
