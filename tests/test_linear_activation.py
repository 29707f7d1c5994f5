"""Linear layer and activation as one call: gradients against dense autograd with the gradient masked."""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprop
from fxprop.errors import OpError
from fxprop.ops import linear_activation
from fxprop.ops.activations import ACTIVATIONS

# the functions as users write them, not as the operator has them
DENSE = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: x * torch.sigmoid(x),
}


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


def assert_close(got, wanted, tolerance=1e-9):
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([(7,), (3, 5), (2, 3, 4), ()]),
    activation=st.sampled_from(sorted(DENSE)),
    score=st.sampled_from(["l1", "l2"]),
    bias=st.sampled_from([None, "full", "selected"]),
    k=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_the_masked_dense_backward(rows, activation, score, bias, k, seed):
    tensors = problem(rows, seed=seed, has_bias=bias is not None)
    bias = bias or "full"
    got = gradients(
        lambda x, w, b: linear_activation(x, w, b, activation=activation, k=k, score=score, bias_grad=bias),
        tensors,
    )
    linear = oracle.masked_linear(oracle.Keep(k=k, score=score, bias=bias))
    wanted = gradients(lambda x, w, b: DENSE[activation](linear(x, w, b)), tensors)
    assert_close(got, wanted)


def test_the_oracle_sees_another_selection_and_another_activation():
    tensors = problem()
    got = gradients(lambda x, w, b: linear_activation(x, w, b, activation="gelu", k=3), tensors)
    for k, activation in ((2, "gelu"), (3, "silu")):
        linear = oracle.masked_linear(oracle.Keep(k=k))
        wanted = gradients(lambda x, w, b: DENSE[activation](linear(x, w, b)), tensors)  # noqa: B023
        with pytest.raises(AssertionError, match="not close"):
            assert_close(got, wanted)


@pytest.mark.parametrize("activation", sorted(DENSE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_that_of_the_two_functions(activation, dtype):
    x, w, b = problem(dtype=dtype)
    y = linear_activation(x, w, b, activation=activation, k=2)
    assert torch.equal(y, ACTIVATIONS[activation](F.linear(x, w, b)))
    assert y.requires_grad


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


def test_what_is_not_finite_is_kept():
    for score in ("l1", "l2"):
        x, w, b = problem()
        gradient = torch.randn(3, 5, 8, dtype=torch.float64)
        gradient[1, 2, 4] = float("nan")
        y = linear_activation(x, w, b, activation="gelu", k=1, score=score)
        assert torch.autograd.grad(y, w, gradient)[0][4].isnan().all()


def test_under_autocast_and_row_sparse():
    x, w, b = (t.detach().float().requires_grad_() for t in problem())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_activation(x, w, b, activation="gelu", k=2, weight_grad="row_sparse")
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert w.grad.is_sparse
    assert {t.grad.dtype for t in (x, w, b)} == {torch.float32}


def test_errors():
    x, w, b = problem()
    with pytest.raises(OpError, match="activation='tanh': expected one of relu, gelu, gelu_tanh, silu"):
        linear_activation(x, w, b, activation="tanh", k=2)
    (grad,) = torch.autograd.grad(
        linear_activation(x, w, b, activation="gelu", k=2).sum(), x, create_graph=True
    )
    with pytest.raises(OpError, match="double backward"):
        grad.sum().backward()


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
