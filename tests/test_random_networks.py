"""Random small networks under random policies: forward, gradients, state and code. `--networks N` draws more."""

import collections
import copy

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


class Projection(nn.Module):
    """A product with a weight that is no layer's."""

    def __init__(self, channels, out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, out))

    def forward(self, x):
        return (x.flatten(2).transpose(1, 2) @ self.kernel).transpose(1, 2).unflatten(2, x.shape[2:])

    def mask(self, keep):
        """As `oracle.mask_module` does a layer."""

        def forward(x):
            y = x.flatten(2).transpose(1, 2) @ self.kernel
            y = oracle.masked(y, None, None, keep, lambda grad: oracle.linear_mask(grad, keep))
            return y.transpose(1, 2).unflatten(2, x.shape[2:])

        self.forward = forward


class Line(nn.Module):
    """A 1-d convolution over the flattened positions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(2)).unflatten(2, x.shape[2:])


KINDS = [
    *("rows", "row", "mlp", "transposed", "product"),
    *("conv", "norm", "activation", "residual", "branch", "gate", "tokens", "line", "shared"),
    *("rows", "rows", "rows", "mlp", "mlp"),
]


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
def convolutions(draw, channels, same=False, wide=False):
    """A 2-d convolution of a random form, and its output channels; `same` keeps shape."""
    groups = draw(st.sampled_from([g for g in ((1, 2) if wide else (1, 2, channels)) if channels % g == 0]))
    per_group = draw(st.integers(3 if wide else 1, max(3 if wide else 1, 8 // groups)))
    out = channels if same else groups * per_group
    kernel = draw(st.sampled_from([1, 3]))
    dilation = draw(st.sampled_from([1, 2]))
    layer = nn.Conv2d(
        channels,
        out,
        kernel,
        stride=1 if same or wide else draw(st.sampled_from([1, 2])),
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
    kind = draw(st.sampled_from(KINDS))
    if kind in ("row", "rows"):
        layers, width = [], channels
        for _ in range(2 if kind == "rows" else 1):
            layer, width = draw(convolutions(width, wide=True))
            norm = nn.BatchNorm2d(width, affine=draw(st.booleans()))
            layers += [
                layer,
                norm,
                *([nn.ReLU(inplace=draw(st.booleans()))] if draw(st.booleans()) else []),
            ]
        return nn.Sequential(*layers), width
    if kind == "transposed":
        groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
        out = groups * draw(st.integers(1, max(1, 8 // groups)))
        stride = draw(st.sampled_from([1, 2]))
        return nn.ConvTranspose2d(channels, out, 3, stride, 1, stride - 1, groups, draw(st.booleans())), out
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
    if kind == "mlp":
        activations = (nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(inplace=True))
        return Tokens(nn.Sequential(nn.Linear(channels, out), draw(st.sampled_from(activations)))), out
    if kind == "product":
        return Projection(channels, out), out
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
    return Network(chosen, width).double(), torch.randn(4, channels, 6, 6, dtype=torch.double)


WORDS = {
    "score_fraction": [0.3, 0.6, 1.0],
    "norm_grad": ["full", "kept"],
    "weight_grad": ["dense", "row_sparse"],
    "regions": [True, False],
    "when": ["always", "faster"],
}
# what makes chains of regions
FAST = {"select": "channel", "score_fraction": 0.3, "norm_grad": "kept", "regions": True, "when": "always"}


@st.composite
def rules(draw):
    """Settings of one layer."""
    return {
        "keep": draw(st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])),
        "select": draw(st.sampled_from(["channel", "element"])),
        "score": draw(st.sampled_from(["l1", "l2"])),
        "bias": draw(st.sampled_from(["full", "selected"])),
        "round_to": draw(st.sampled_from([1, 2])),
        **{name: draw(st.sampled_from(values)) for name, values in WORDS.items()},
    }


DEFAULT = 120  # networks, and always the same ones
OF_KEEP = ("keep", "select", "score", "bias", "round_to", "score_fraction")
LAYERS = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def layers_of(network):
    """Layers by the name of their site."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, LAYERS)}
    products = {n: m for n, m in network.named_modules() if isinstance(m, Projection)}
    return {**found, **{f"{name}.kernel": module for name, module in products.items()}}


def used_twice(network):
    """Layers that are called at two places, which one rule is about."""
    parts = [part for part in network.parts if isinstance(part, nn.Sequential) and part[0] is part[-1]]
    return [part[0] for part in parts if len(part) > 1]


def is_dense(values, module):
    """Whether k = n, or keep = 1, where the layer is the original one with all of its bias gradient."""
    if values["keep"] == 1.0:
        return True
    if isinstance(module, Projection | nn.Linear):
        n = module.kernel.shape[1] if isinstance(module, Projection) else module.out_features
    elif values["select"] == "element":
        return False
    else:
        n = module.out_channels // (1 if module.groups == module.out_channels else module.groups)
    return oracle.Keep(keep=values["keep"], round_to=values["round_to"]).count(n) == n


def following(network, layer, x):
    """The batch-norm that gets what `layer` gives."""
    given, found = [], []

    def look(norm, args):
        if given and args[0] is given[0]:
            found.append(norm)

    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(lambda module, args, output: given.append(output))]
    hooks += [norm.register_forward_pre_hook(look) for norm in norms]
    copy_of_state = copy.deepcopy(network.state_dict())
    network(x)
    network.load_state_dict(copy_of_state)
    for hook in hooks:
        hook.remove()
    return found[0]


def masked(network, x, of_layer, report):
    """A copy that masks by hand what the report says is rewritten; it also checks k."""
    expected = copy.deepcopy(network)
    layers = layers_of(expected)
    of_name = {layer.name: layer for layer in report.layers}
    for name, values in of_layer.items():
        keep = oracle.Keep(**{key: values[key] for key in OF_KEEP})
        layer, module = of_name[name], layers[name]
        if layer.status != "rewritten":
            assert is_dense(values, module) or values["when"] == "faster", layer
            continue
        assert layer.k == keep.count(layer.n)
        if isinstance(module, Projection):
            module.mask(keep)
        elif layer.region is not None and layer.region.startswith("batch_norm"):
            oracle.mask_region(module, following(expected, module, x), keep, values["norm_grad"])
        else:
            oracle.mask_module(module, keep)
    return expected


def check(network, x, of_layer, seen):
    """`of_layer`: the settings of each layer; `seen` counts what came up."""
    given = [fxprop.Rule(name=name, **values) for name, values in of_layer.items()]
    gm, report = fxprop.transform(network, fxprop.Policy(keep=0.5, rules=given), (x,))
    names = {layer.name.partition("#")[0] for layer in report.layers}
    assert names == set(layers_of(network))
    expected = masked(network, x, of_layer, report)
    for mode in (True, False, True):
        statistics = copy.deepcopy(network.state_dict())
        ours = gm.train(mode)(x)
        gm.load_state_dict(statistics)
        assert torch.equal(ours, network.train(mode)(x))
        gm.load_state_dict(statistics)
    assert list(gm.state_dict()) == list(network.state_dict())
    assert all(a is b for a, b in zip(gm.parameters(), network.parameters(), strict=True))

    try:
        wanted = oracle.gradients(expected, [x])
    except oracle.Tie:
        seen["ties"] += 1
        return
    oracle.assert_same_gradients(oracle.gradients(gm, [x]), wanted)
    dense = fxprop.restore(gm)
    oracle.assert_same_gradients(oracle.gradients(dense, [x]), oracle.gradients(network, [x]), 0, 0)
    seen["networks"] += 1
    for layer in report.layers:
        seen.update({f"op {layer.op}", f"status {layer.status}", f"region {layer.region}"})
        seen["chains"] += layer.chain is not None
        seen["row-sparse"] += layer.weight_grad == "row_sparse"
        seen["chains of masks"] += layer.chain is not None and "batch_norm" in str(layer.region)
    if seen["networks"] % 8 == 0:  # what else would be written is what keep=1 writes
        assert dense.code == fxprop.restore(fxprop.transform(network, 1.0, (x,))[0]).code


def test_random_networks(request):
    count = request.config.getoption("--networks")
    seen = collections.Counter()

    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=count == DEFAULT,
    )
    @given(data=st.data())
    def run(data):
        network, x = data.draw(networks())
        base = data.draw(st.sampled_from([FAST, FAST, {}]))
        of_layer = {name: {**data.draw(rules()), **base} for name in layers_of(network)}
        for name, module in layers_of(network).items():
            if any(module is other for other in used_twice(network)):
                of_layer[name]["regions"] = False  # a region at one of its places alone
        check(network, x, of_layer, seen)

    run()
    if count >= DEFAULT:
        for what in (
            *(
                "region batch_norm",
                "region batch_norm + relu",
                "chains",
                "row-sparse",
                "op conv_transpose2d",
            ),
            *("op matmul", "status dense"),
        ):
            assert seen[what] >= count / 40, f"{what} in {count} networks: {dict(seen)}"
        assert (
            seen["region relu"] + seen["region gelu"] + seen["region gelu_tanh"] + seen["region silu"] > 0
        )
        assert seen["ties"] < count / 5


def test_the_check_can_fail(monkeypatch):
    """An oracle that keeps one more is noticed."""
    torch.manual_seed(0)
    network = Network([nn.Conv2d(3, 8, 3), nn.ReLU()], 8).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.double)
    plain = {"keep": 0.5, "select": "channel", "score": "l1", "bias": "full", "round_to": 1}
    plain |= {"score_fraction": 1.0, "norm_grad": "full", "when": "always"}
    of_layer = dict.fromkeys(layers_of(network), plain)
    check(network, x, of_layer, collections.Counter())
    largest = oracle.largest
    monkeypatch.setattr(oracle, "largest", lambda scores, k: largest(scores, k + 1))
    with pytest.raises(AssertionError, match="not close"):
        check(network, x, of_layer, collections.Counter())
