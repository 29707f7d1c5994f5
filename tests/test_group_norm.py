"""Convolution, group norm and activation as one operator, against dense autograd masked by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprop
from fxprop import ops
from fxprop.errors import OpError
from fxprop.ops.activations import ACTIVATIONS

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Masked(torch.autograd.Function):
    """The identity, whose gradient keeps the channels with the largest scores, in each group of them."""

    @staticmethod
    def forward(ctx, y, k, groups, score, fraction):
        ctx.given = k, groups, score, fraction
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        k, groups, score, fraction = ctx.given
        looked_at = grad[: -int(-fraction * len(grad) // 1)]
        mask = torch.zeros_like(grad)
        size = grad.shape[1] // groups
        for group in range(groups):
            channels = range(group * size, (group + 1) * size)
            powers = [looked_at[:, c].abs().pow(2 if score == "l2" else 1).sum().item() for c in channels]
            for best in sorted(range(size), key=lambda i: -powers[i])[:k]:
                mask[:, channels[best]] = 1
        return grad * mask, None, None, None, None


def tensors(dims=2, groups=1, bias=True, affine=True, seed=0, n=3):
    torch.manual_seed(seed)
    x = torch.randn(n, 4, *(6, 5, 4)[:dims], dtype=torch.float64)
    w = torch.randn(8, 4 // groups, *(3,) * dims, dtype=torch.float64)
    norm = nn.GroupNorm(4, 8, affine=affine, dtype=torch.float64)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    b = torch.randn(8, dtype=torch.float64) if bias else None
    return [t if t is None else t.requires_grad_() for t in (x, w, b)], norm


def gradients(call, given, norm, seed=1):
    x, w, b = given
    y = call(x, w, b, norm)
    torch.manual_seed(seed)
    leaves = [t for t in (x, w, b, *norm.parameters()) if t is not None]
    return y, torch.autograd.grad(y, leaves, torch.randn_like(y))


def masked(activation, k, groups, score="l1", fraction=1.0):
    def call(x, w, b, norm):
        # the bias is added behind the mask: its gradient is that of all channels
        y = Masked.apply(
            CONVS[x.dim() - 2](x, w, None, padding=1, groups=groups), k, groups, score, fraction
        )
        if b is not None:
            y = y + b.view(-1, *(1,) * (x.dim() - 2))
        y = norm(y)
        return y if activation is None else ACTIVATIONS[activation](y)

    return call


def region(activation, k, groups, **keep):
    return lambda x, w, b, norm: ops.conv_group_norm(
        x, w, b, norm, padding=1, groups=groups, activation=activation, k=k, **keep
    )


def same(a, b):
    return all(torch.allclose(p, q, rtol=1e-9, atol=1e-9) for p, q in zip(a, b, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    activation=st.sampled_from([*ACTIVATIONS, None]),
    score=st.sampled_from(["l1", "l2"]),
    fraction=st.sampled_from([1.0, 0.5]),
    k=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_gradients_are_those_of_the_kept_channels(
    dims, groups, bias, affine, activation, score, fraction, k, seed
):
    given, norm = tensors(dims, groups, bias, affine, seed)
    keep = {"score": score, "score_fraction": fraction}
    y, got = gradients(region(activation, k, groups, **keep), given, norm)
    _, want = gradients(masked(activation, k, groups, score, fraction), given, norm)
    dense = CONVS[dims](given[0], given[1], given[2], padding=1, groups=groups)
    dense = norm(dense) if activation is None else ACTIVATIONS[activation](norm(dense))
    assert torch.equal(y, dense)
    assert same(got, want)


def test_the_oracle_can_fail():
    given, norm = tensors()
    _, got = gradients(region("relu", 2, 1), given, norm)
    assert not same(got, gradients(masked("relu", 3, 1), given, norm)[1])


def test_a_selected_bias_is_that_of_the_kept_channels():
    given, norm = tensors()
    full = gradients(region("silu", 2, 1), given, norm)[1][2]
    selected = gradients(region("silu", 2, 1, bias_grad="selected"), given, norm)[1][2]
    kept = selected != 0
    assert kept.sum() == 2
    torch.testing.assert_close(selected[kept], full[kept])


@pytest.mark.parametrize("frozen", ["input", "weight", "norm", "all but bias"])
def test_only_what_is_needed_is_computed(frozen):
    given, norm = tensors()
    want = dict(zip("xwbgh", gradients(region("relu", 2, 1), given, norm)[1], strict=True))
    x, w, b = given
    x.requires_grad_(frozen not in ("input", "all but bias"))
    w.requires_grad_(frozen not in ("weight", "all but bias"))
    norm.requires_grad_(frozen not in ("norm", "all but bias"))
    y = region("relu", 2, 1)(x, w, b, norm)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    for name, tensor in zip("xwbgh", (x, w, b, norm.weight, norm.bias), strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, want[name])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("channels_last", [False, True])
def test_float32_and_layouts(channels_last):
    given, norm = tensors()
    norm = norm.float()
    given = [t.detach().float().requires_grad_() for t in given]
    if channels_last:
        given[0] = given[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    y, got = gradients(region("relu", 3, 1), given, norm)
    _, want = gradients(masked("relu", 3, 1), given, norm)
    assert torch.equal(y, norm(F.conv2d(*given, padding=1)).relu())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "hook", "element"])
def test_where_it_does_not_fit_the_three_are_called(how):
    given, norm = tensors()
    keep = {}
    if how == "bfloat16":
        norm, given = norm.bfloat16(), [t.detach().bfloat16().requires_grad_() for t in given]
    if how == "hook":
        norm.register_forward_hook(lambda module, args, output: output * 2)
    if how == "element":
        keep = {"select": "element"}
    if how == "autocast":
        norm, given = norm.float(), [t.detach().float().requires_grad_() for t in given]
    x, w, b = given
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = region("relu", 2, 1, **keep)(x, w, b, norm)
        want = norm(ops.conv2d(x, w, b, padding=1, k=2, **keep)).relu()
    assert torch.equal(y, want)
    leaves = (x, w, b, *norm.parameters())
    pairs = zip(*(torch.autograd.grad(of.sum(), leaves) for of in (y, want)), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_errors():
    (x, w, b), norm = tensors()
    with pytest.raises(OpError, match="conv_group_norm: activation='tanh': expected one of relu"):
        ops.conv_group_norm(x, w, b, norm, activation="tanh", k=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'norm_grad'"):
        ops.conv_group_norm(x, w, b, norm, norm_grad="kept", k=1)
    y = ops.conv_group_norm(x, w, b, norm, k=1)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(OpError, match="double backward"):
        grad.sum().backward()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.act = nn.SiLU()
        self.last = nn.Conv2d(16, 16, 3)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        return self.head(self.last(self.act(self.norm(self.conv(x)))))


def test_a_policy_forms_the_region_and_the_report_names_it():
    x = torch.randn(2, 3, 8, 8)
    gm, report = fxprop.transform(Net(), fxprop.Policy(keep=0.25, when="always"), (x,))
    assert "fxprop_ops_conv_group_norm" in gm.code
    assert "activation = 'silu', k = 4" in gm.code
    assert report.layers[0].region == "group_norm + silu"
    assert "group_norm + silu" in str(fxprop.explain(gm, "conv"))
    gm, report = fxprop.transform(Net(), fxprop.Policy(keep=0.25, when="always", regions=False), (x,))
    assert "conv_group_norm" not in gm.code


def test_a_site_with_it_can_be_timed():
    gm, _ = fxprop.transform(Net(), fxprop.Policy(keep=0.25, when="always"), (torch.randn(2, 3, 8, 8),))
    fxprop.tune(gm, rounds=1)
    assert "measured " in str(fxprop.explain(gm, "conv"))


@pytest.mark.parametrize(("size", "formed"), [(16, False), (128, True)])
def test_the_cost_model_forms_large_regions_alone(size, formed):
    with torch.device("meta"):
        model = Net()
    x = torch.empty(8, 3, size, size, device="meta")
    layer = fxprop.estimate(model, fxprop.Policy(keep=0.25), (x,)).layers[0]
    assert (layer.region == "group_norm + silu") is formed
