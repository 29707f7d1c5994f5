"""Convolution, batch-norm and ReLU as one call, by itself and in graphs; see tests/test_operators.py too."""

import copy
import functools
import io
import re

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprop
from fxprop.errors import OpError, PolicyError
from fxprop.ops import conv_batch_norm
from fxprop.ops.kernels import one_pass as fused

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture
def always_fused(monkeypatch):
    """Small tensors through inductor too."""
    monkeypatch.setattr(fused, "_WORTH_COMPILING", 0)
    return fused


def masked(x, weight, bias, norm, activation, keep, groups=1, padding=1):
    """The dense functions, with the convolution's output gradient masked by hand."""
    conv = oracle.masked_conv(weight.dim() - 2, keep)
    y = norm(conv(x, weight, bias, 1, padding, 1, groups))
    return F.relu(y) if activation else y


def problem(dims, groups=1, channels=8, dtype=torch.float64, affine=True, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x = randn(3, 2 * groups, *([5] * dims))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = randn(channels, 2, *([3] * dims)).requires_grad_()
    bias = randn(channels).requires_grad_()
    norm = NORMS[dims](channels, affine=affine, dtype=dtype)
    if affine:
        norm.weight.data.copy_(randn(channels))
        norm.bias.data.copy_(randn(channels))
    return x, weight, bias, norm


def outcome(function, x, weight, bias, norm):
    """Output, gradients and running statistics of one step."""
    norm = copy.deepcopy(norm)
    leaves = [t for t in (x, weight, bias, *norm.parameters()) if t is not None]
    output = function(norm)
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    gradients = torch.autograd.grad((output * coefficients).sum(), leaves)
    return output, gradients, list(norm.buffers())


def expected(x, weight, bias, norm, activation, keep, groups=1):
    """Output and statistics of the dense functions, gradients of the masked ones."""
    leaves = (x, weight, bias, norm)

    def dense(norm):
        y = norm(CONVS[weight.dim() - 2](x, weight, bias, 1, 1, 1, groups))
        return F.relu(y) if activation else y

    # the oracle adds the bias by itself, which may round differently from the convolution's kernel
    close, gradients, _ = outcome(lambda n: masked(x, weight, bias, n, activation, keep, groups), *leaves)
    output, _, statistics = outcome(dense, *leaves)
    torch.testing.assert_close(close, output)
    return output, gradients, statistics


def assert_same(got, wanted, tolerance=1e-9):
    assert torch.equal(got[0], wanted[0])
    for ours, theirs in zip(got[1], wanted[1], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(got[2], wanted[2], strict=True))


def compare(dims, activation, score, k=2, groups=1, **options):
    x, weight, bias, norm = problem(dims, groups, **options)
    keep = oracle.Keep(k=k, score=score)
    got = outcome(
        lambda norm: conv_batch_norm(
            x, weight, bias, norm, padding=1, groups=groups, activation=activation, k=k, score=score
        ),
        x, weight, bias, norm,
    )  # fmt: skip
    assert_same(got, expected(x, weight, bias, norm, activation, keep, groups))


@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_formulas_agree_with_the_oracle(always_fused, channels_last, activation, score):
    compare(2, activation, score, channels_last=channels_last)
    assert not fused._broken


def test_scores_from_a_part_of_the_batch():
    x, weight, bias, _ = problem(2)
    gradient = torch.zeros(3, 8, 5, 5, dtype=torch.float64)
    gradient[0, 1] = 1  # the first example speaks for channel 1, the others for 6
    gradient[1:, 6] = 5
    for fraction, kept in ((1.0, 6), (0.3, 1)):
        y = fxprop.ops.conv2d(x, weight, bias, padding=1, k=1, score_fraction=fraction)
        (found,) = torch.autograd.grad(y, weight, gradient)
        assert found.flatten(1).any(1).nonzero().flatten().tolist() == [kept]


def test_running_statistics_momentum_none_eval_and_frozen():
    for momentum in (0.1, None):
        x, weight, bias, norm = problem(2)
        norm.momentum = momentum
        twin = copy.deepcopy(norm)
        for _ in range(3):
            conv_batch_norm(x, weight, bias, norm, k=2)
            twin(F.conv2d(x, weight, bias))
        assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), twin.buffers(), strict=True))
    norm.eval()
    assert_same(
        outcome(lambda n: conv_batch_norm(x, weight, bias, n, padding=1, k=2), x, weight, bias, norm),
        expected(x, weight, bias, norm, None, oracle.Keep(k=2)),
    )
    norm.train().requires_grad_(False)
    output = conv_batch_norm(x, weight, bias, norm, k=2)
    output.sum().backward()
    assert norm.weight.grad is None
    assert weight.grad is not None


def test_half_precision_under_autocast():
    x, weight, bias, norm = problem(2, dtype=torch.float32)
    keep, bias = oracle.Keep(k=2, score="l2"), None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outcome(
            lambda n: conv_batch_norm(x, weight, bias, n, padding=1, activation="relu", k=2, score="l2"),
            x, weight, bias, norm,
        )  # fmt: skip
        wanted = outcome(lambda n: masked(x, weight, bias, n, "relu", keep), x, weight, bias, norm)
    assert [g.dtype for g in got[1]] == [g.dtype for g in wanted[1]]
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1][1], wanted[1][1], rtol=0.05, atol=0.5)


def test_refusals():
    x, weight, bias, norm = problem(2)
    with pytest.raises(OpError, match="activation='gelu': expected 'relu' or None"):
        conv_batch_norm(x, weight, bias, norm, activation="gelu", k=2)


def test_without_a_compiler(always_fused, monkeypatch, caplog):
    monkeypatch.setattr(fused, "_broken", [])

    def fail(formula):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fused, "_compile", fail)
    compare(2, "relu", "l2")
    assert "inductor cannot compile on this machine" in caplog.text


# --- in graphs ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A region with ReLU, one without, one whose norm has a second user, and one under SyncBatchNorm."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.norm_c = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.d, self.norm_d = nn.Conv2d(8, 8, 1), nn.SyncBatchNorm(8)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.norm_a(self.a(x)))
        x = F.gelu(self.norm_b(self.b(x))) + x
        normed = self.norm_c(self.c(x))
        x = F.relu(normed) + normed
        if not self.training:
            x = self.norm_d(self.d(x))
        return self.fc(x.mean((2, 3)))


X = torch.randn(4, 3, 6, 6)


def rewritten(model, **settings):
    policy = fxprop.Policy(**{"keep": 0.25, "score": "l2", "when": "always", **settings})
    return fxprop.transform(model, policy, (X.to(next(model.parameters()).dtype),))


def test_regions_in_a_graph():
    gm, report = rewritten(Net())
    assert gm.code.count("fxprop_ops_conv_batch_norm") == 3
    assert "activation = 'relu'" in gm.code
    assert "self.norm_b" in gm.code
    assert {layer.name: layer.region for layer in report.layers} == {
        "a": "batch_norm + relu", "b": "batch_norm", "c": "batch_norm", "fc": None,
    }  # fmt: skip
    assert "fxprop_ops_conv_batch_norm" not in rewritten(Net(), regions=False)[0].code
    assert "fxprop_ops_conv_batch_norm" not in rewritten(Net(), select="element")[0].code
    gm.eval()
    assert torch.equal(gm(X), fxprop.restore(gm)(X))


@pytest.mark.parametrize("score", ["l1", "l2"])
def test_gradients_of_a_model_with_regions(score):
    model = Net().double()
    gm, _ = rewritten(model, score=score)
    reference = copy.deepcopy(model)
    oracle.mask_model(reference, oracle.Keep(keep=0.25, score=score), except_for=("fc",))
    wanted, _ = oracle.gradients(reference, [X.double()])
    got, _ = oracle.gradients(gm, [X.double()])
    for name, gradient in wanted.items():
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=1e-8, msg=name)


def test_copies_files_hooks_and_converted_norms():
    gm, _ = rewritten(Net())
    twin = copy.deepcopy(gm)
    assert twin.norm_a is not gm.norm_a
    assert torch.equal(twin(X), gm(X))
    assert torch.equal(twin.norm_a.running_mean, gm.norm_a.running_mean)
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), gm(X))
    seen = []
    gm.norm_a.register_forward_hook(lambda *_: seen.append(1))
    gm(X)
    assert seen == [1]
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), loaded(X))


def test_modules_with_hooks_are_no_part_of_a_region():
    model = Net()
    model.norm_a.register_forward_hook(lambda *_: None)
    gm, _ = rewritten(model)
    assert gm.code.count("fxprop_ops_conv_batch_norm") == 2


def test_set_keep_takes_regions_apart_and_puts_them_together():
    gm, _ = rewritten(Net())
    code = gm.code
    fxprop.set_keep(gm, 1.0)
    assert "fxprop_ops" not in gm.code
    fxprop.set_keep(gm, 0.25)
    assert gm.code == code


def test_settings_are_checked():
    for setting, value in (("norm_grad", "no"), ("when", "never"), ("score_fraction", 0), ("regions", 1)):
        with pytest.raises(PolicyError, match=f"policy: {setting}={value!r}: expected"):
            fxprop.Policy(keep=0.1, **{setting: value})
    assert fxprop.Policy.fast(0.1) == fxprop.Policy(
        keep=0.1, score="l2", score_fraction=0.25, norm_grad="kept", bias="selected"
    )


def test_the_time_of_compiling_is_told_once_per_backward(monkeypatch, caplog):
    from torch._dynamo.utils import counters

    def compiling(x):
        counters["stats"]["unique_graphs"] += 1
        return x.sum()

    class Compiles(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            fused.call_compiled(compiling, grad)
            return grad

    monkeypatch.setattr(fused, "_compile", lambda formula: formula)
    monkeypatch.setattr(fused, "_WORTH_SAYING", 0.0)
    x = torch.ones(3, requires_grad=True)
    Compiles.apply(Compiles.apply(x)).sum().backward()
    assert re.findall(r"compiling (\d) formulas by inductor took \d+\.\d s", caplog.text) == ["2"]
    fused.call_compiled(compiling, torch.ones(3))  # and at once where there is no backward
    assert re.findall(r"compiling (\d) formulas", caplog.text) == ["2", "1"]
    caplog.clear()
    fused.call_compiled(torch.sum, torch.ones(3))
    assert caplog.text == ""


def test_maps_of_other_sizes_are_no_other_formula(always_fused, monkeypatch):
    made = []

    def count(graph, inputs):
        made.append(graph)
        return graph.forward

    # what decides whether dynamo takes another size for another formula, without the compiler behind it
    compiled = functools.cache(lambda of: torch.compile(of, dynamic=True, fullgraph=True, backend=count))
    monkeypatch.setattr(fused, "_compile", compiled)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=0.5, when="always"), (torch.randn(2, 3, 12, 12),))
    numbers = []
    for size in ((12, 12), (9, 14), (17, 8)):
        gm(torch.randn(2, 3, *size)).square().sum().backward()
        numbers.append(len(made))
    assert numbers[0] > 0
    assert numbers == [numbers[0]] * 3
