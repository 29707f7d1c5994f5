"""Linear layer and activation as one call, by itself and in models; see tests/test_operators.py too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import nn

import fxprop
from fxprop.errors import OpError
from fxprop.ops import linear_activation


def problem(rows=(3, 5), features=8, seed=0, dtype=torch.float64, has_bias=True):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    return randn(*rows, 6), randn(features, 6), randn(features) if has_bias else None


def gradients(function, tensors):
    leaves = [t for t in tensors if t is not None]
    output = function(*tensors)
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return torch.autograd.grad((output * coefficients).sum(), leaves, allow_unused=True)


def test_pieces_add_up_to_the_whole(monkeypatch):
    tensors = problem(rows=(50,))
    call = lambda x, w, b: linear_activation(x, w, b, activation="gelu", k=3)  # noqa: E731
    whole = gradients(call, tensors)
    monkeypatch.setattr("fxprop.ops.regions.linear_activation._PIECE", 24)
    assert_close(gradients(call, tensors), whole)


def test_scores_from_a_part_of_the_rows():
    x, w, _ = problem(rows=(4,), has_bias=False)
    gradient = torch.zeros(4, 8, dtype=torch.float64)
    gradient[0, 1] = 1  # the first row speaks for feature 1, the others for 6
    gradient[1:, 6] = 5
    for fraction, kept in ((1.0, 6), (0.25, 1)):
        y = linear_activation(x, w, activation="gelu", k=1, score_fraction=fraction)
        (found,) = torch.autograd.grad(y, w, gradient)
        assert found.any(1).nonzero().flatten().tolist() == [kept]


def test_bias_alone_and_nothing_at_all():
    x, w, b = problem()
    x, w = x.detach(), w.detach()
    y = linear_activation(x, w, b, activation="silu", k=2)
    wanted = torch.autograd.grad(F.silu(F.linear(x, w, b)).sum(), b)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), b)[0], wanted)
    assert not linear_activation(x, w, b.detach(), activation="silu", k=2).requires_grad


def test_errors():
    x, w, b = problem()
    with pytest.raises(OpError, match="activation='tanh': expected one of relu, gelu, gelu_tanh, silu"):
        linear_activation(x, w, b, activation="tanh", k=2)


class Mlp(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 2)
        self.activation = activation

    def forward(self, x):
        return self.head(self.fc2(self.activation(self.fc1(x))))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"), (nn.GELU(), "gelu"), (nn.SiLU(), "silu"),
        (nn.GELU("tanh"), "gelu_tanh"), (F.gelu, "gelu"), (torch.relu, "relu"), (F.silu, "silu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"), (lambda x: x.relu(), "relu"),
        (lambda x: F.silu(x, inplace=True), "silu"),
        (nn.Tanh(), None), (lambda x: F.relu6(x), None), (lambda x: torch.relu(x) + x, None),
    ],
)  # fmt: skip
def test_models_get_one_call(activation, name):
    torch.manual_seed(0)
    mlp = Mlp(activation).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    policy = fxprop.Policy(keep=0.25, when="always")
    gm, report = fxprop.transform(mlp, policy, (x,))
    assert [layer.region for layer in report.layers] == [name, None, None]
    assert gm.code.count("linear_activation") == (1 if name else 0)
    apart, _ = fxprop.transform(mlp, fxprop.Policy(keep=0.25, when="always", regions=False), (x,))
    assert torch.equal(gm(x), mlp(x))
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (gm, apart)]
    assert_close(*grads)
    assert torch.equal(fxprop.restore(gm)(x), mlp(x))


def test_regions_are_formed_where_they_win():
    mlp = Mlp(nn.GELU())

    def region(policy):
        return fxprop.estimate(mlp, policy, (torch.empty(4, 6),)).layers[0].region

    assert region(fxprop.Policy(keep=0.25)) is None
    assert region(fxprop.Policy.fast(keep=0.25)) == "gelu"
    assert region(fxprop.Policy.fast(keep=0.25, bias="full")) is None
    assert region(fxprop.Policy.fast(keep=0.25, regions=False)) is None


def test_hooked_activations_stay_calls():
    mlp = Mlp(nn.GELU())
    mlp.activation.register_forward_hook(lambda *_: None)
    report = fxprop.estimate(mlp, fxprop.Policy(keep=0.25, when="always"), (torch.empty(4, 6),))
    assert report.layers[0].region is None


def test_training_goes_down_and_copies_work():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    target = x[:, :2].sin()
    gm, _ = fxprop.transform(Mlp(nn.GELU()), fxprop.Policy.fast(keep=0.25, when="always"), (x,))
    gm = copy.deepcopy(gm)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(gm(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
