"""Random small networks under random policies: forward, gradients, state and code. `--networks N` draws more."""

import copy
import math

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxprop


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Branches(nn.Module):
    def __init__(self, left, right, join):
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        return left * right.sigmoid() if self.join == "gate" else torch.cat([left, right], 1)


class Tokens(nn.Module):
    """A linear layer over the channels of every position."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        n, _, h, w = x.shape
        rows = self.layer(x.flatten(2).transpose(1, 2))
        return rows.transpose(1, 2).reshape(n, rows.shape[-1], h, w)


class Line(nn.Module):
    """A 1-d convolution over the flattened positions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(2)).unflatten(2, x.shape[2:])


class Network(nn.Module):
    def __init__(self, parts, channels):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        # squared: a plain mean would give every position the same gradient, and ties
        return self.head(x.square().mean((2, 3)))


@st.composite
def convolutions(draw, channels, same=False):
    """A 2-d convolution of a random form, and its output channels; `same` keeps shape."""
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    out = channels if same else groups * draw(st.integers(1, max(1, 8 // groups)))
    kernel = draw(st.sampled_from([1, 3]))
    dilation = draw(st.sampled_from([1, 2]))
    layer = nn.Conv2d(
        channels,
        out,
        kernel,
        stride=1 if same else draw(st.sampled_from([1, 2])),
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular"])),
    )
    return layer, out


@st.composite
def parts(draw, channels):
    """One part of a network, and the channels it gives."""
    kind = draw(
        st.sampled_from(
            ["conv", "norm", "activation", "residual", "branch", "gate", "tokens", "line", "shared"]
        )
    )
    if kind == "conv":
        layer, out = draw(convolutions(channels))
        return (nn.Sequential(layer, nn.ReLU(inplace=True)) if draw(st.booleans()) else layer), out
    if kind == "norm":
        norms = (
            nn.BatchNorm2d(channels),
            nn.GroupNorm(1, channels),
            nn.BatchNorm2d(channels, affine=False),
        )
        return draw(st.sampled_from(norms)), channels
    if kind == "activation":
        activations = (nn.ReLU(), nn.GELU(), nn.Tanh(), nn.SiLU())
        return draw(st.sampled_from(activations)), channels
    if kind == "residual":
        layer, _ = draw(convolutions(channels, same=True))
        return Residual(nn.Sequential(layer, nn.ReLU())), channels
    if kind in ("branch", "gate"):
        (left, _), (right, _) = (draw(convolutions(channels, same=True)) for _ in range(2))
        return Branches(left, right, kind), channels * (2 if kind == "branch" and channels <= 4 else 1)
    out = draw(st.integers(1, 8))
    if kind == "tokens":
        return Tokens(nn.Linear(channels, out, bias=draw(st.booleans()))), out
    if kind == "line":
        return Line(nn.Conv1d(channels, out, 3, padding=1)), out
    layer, _ = draw(convolutions(channels, same=True))
    return nn.Sequential(layer, nn.Tanh(), layer), channels


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels = draw(st.sampled_from([2, 3, 4]))
    chosen, width = [], channels
    for _ in range(draw(st.integers(1, 5))):
        part, out = draw(parts(width))
        if isinstance(part, Branches) and part.join == "branch" and out == width:
            part.join = "gate"  # too wide to be concatenated
        chosen.append(part)
        width = out
    return Network(chosen, width).double(), torch.randn(3, channels, 6, 6, dtype=torch.double)


@st.composite
def keeps(draw):
    return oracle.Keep(
        keep=draw(st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])),
        select=draw(st.sampled_from(["channel", "element"])),
        score=draw(st.sampled_from(["l1", "l2"])),
        bias=draw(st.sampled_from(["full", "selected"])),
        round_to=draw(st.sampled_from([1, 2])),
    )


def layers_of(network):
    return [n for n, m in network.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]


def settings_of(keep):
    return {name: getattr(keep, name) for name in ("keep", "select", "score", "bias", "round_to")}


def is_dense(keep, module):
    """Whether k = n, or keep = 1, where the layer is the original one with all of its bias gradient."""
    if keep.keep == 1.0:
        return True
    if keep.select == "element":
        return False
    groups = getattr(module, "groups", 1)
    n = module.weight.shape[0] // (1 if groups == module.weight.shape[0] else groups)
    return keep.count(n) == n


def check(network, x, of_layer):
    """`of_layer`: what each layer keeps."""
    rules = [fxprop.Rule(name=name, **settings_of(keep)) for name, keep in of_layer.items()]
    expected = copy.deepcopy(network)
    for name, module in expected.named_modules():
        keep = of_layer.get(name)
        if keep is not None and not is_dense(keep, module):
            oracle.mask_module(module, keep)
    gm, report = fxprop.transform(network, fxprop.Policy(keep=0.5, rules=rules), (x,))

    assert {layer.name.partition("#")[0] for layer in report.layers} == set(layers_of(network))
    for mode in (True, False, True):
        statistics = copy.deepcopy(network.state_dict())
        ours = gm.train(mode)(x)
        gm.load_state_dict(statistics)
        assert torch.equal(ours, network.train(mode)(x))
        gm.load_state_dict(statistics)
    assert list(gm.state_dict()) == list(network.state_dict())
    assert all(a is b for a, b in zip(gm.parameters(), network.parameters(), strict=True))

    oracle.assert_same_gradients(oracle.gradients(gm, [x]), oracle.gradients(expected, [x]))
    dense = fxprop.restore(gm)
    assert dense.code == fxprop.restore(fxprop.transform(network, 1.0, (x,))[0]).code
    oracle.assert_same_gradients(oracle.gradients(dense, [x]), oracle.gradients(network, [x]), 0, 0)


def test_random_networks(request):
    count = request.config.getoption("--networks")

    @settings(
        max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=count == 200
    )
    @given(data=st.data())
    def run(data):
        network, x = data.draw(networks())
        of_layer = {name: data.draw(keeps()) for name in layers_of(network)}
        check(network, x, of_layer)

    run()


def test_the_check_can_fail(monkeypatch):
    """An oracle that keeps one more is noticed."""
    torch.manual_seed(0)
    network = Network([nn.Conv2d(3, 8, 3), nn.ReLU()], 8).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.double)
    of_layer = dict.fromkeys(layers_of(network), oracle.Keep(keep=0.5))
    check(network, x, of_layer)
    monkeypatch.setattr(oracle.Keep, "count", lambda self, n: min(n, math.floor(self.keep * n) + 1))
    with pytest.raises(AssertionError, match="not close"):
        check(network, x, of_layer)
