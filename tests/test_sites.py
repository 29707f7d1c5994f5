"""Which layers are found, what they are called, and why some are skipped."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize

import fxprop
from fxprop.errors import InputError


def sites_of(model, *inputs, **kwargs):
    return {site.name: site for site in fxprop.layers(model, inputs, **kwargs)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return F.linear(F.linear(x, self.w), self.weight)


def test_names():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block())
            self.twice = nn.Linear(6, 6)
            self.alias = self.twice

        def forward(self, x):
            x = self.alias(self.twice(self.blocks(x)))
            return F.linear(x, self.twice.weight.exp()) + F.linear(input=x, weight=self.twice.weight)

    names = list(sites_of(Model(), torch.randn(2, 4)))
    assert names == ["blocks.0.w", "blocks.0", "twice", "twice#2", "twice#3", "twice#4"]


def test_positions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            hidden = self.a(x)
            size = self.b(x).size(0)  # only a number goes on from here
            return self.c(hidden.relu()).view(size, -1), self.d(hidden)

    sites = sites_of(Model(), torch.randn(2, 4))
    assert [name for name, site in sites.items() if site.is_first] == ["a", "b"]
    assert [name for name, site in sites.items() if site.is_output] == ["b", "c", "d"]


class Overrides(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OverridesConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class PlainSubclass(nn.Linear):
    pass


def hooked(module):
    module.register_forward_hook(lambda m, i, o: o * 2)
    return module


def with_instance_forward(module, product=True):
    forward = (lambda self, x: 2 * F.linear(x, self.weight)) if product else (lambda self, x: x)
    module.forward = types.MethodType(forward, module)
    return module


def old_weight_norm(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.m = module

    def forward(self, x):
        return self.m(x)


@pytest.mark.parametrize(
    "module",
    [
        Overrides(4, 4),
        OverridesConv(4, 4, 1),
        hooked(nn.Linear(4, 4)),
        with_instance_forward(nn.Linear(4, 4)),
        with_instance_forward(nn.Linear(4, 4), product=False),
        old_weight_norm(nn.Linear(4, 4)),
        nn.ConvTranspose2d(4, 4, 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_do_more_than_their_class_are_traced_on_their_own(module):
    """What they do besides stays: the hook, the other forward, the computed weight."""
    x = (
        torch.randn(2, 4, 3, 3)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        else torch.randn(2, 3, 4)
    )
    model = Wrapped(module)
    policy = fxprop.Policy(rules=[fxprop.Rule(name="*", keep=0.5)], allow_unmatched=True)
    gm, report = fxprop.transform(model, policy, (x,))
    without_product = "forward" in vars(module) and module(x) is x
    assert [(x.name, x.status) for x in report.layers] == ([] if without_product else [("m", "rewritten")])
    assert torch.equal(gm(x), model(x))
    assert isinstance(gm.m, type(module))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LSTM(4, 4), "recurrent layer is one fused kernel"),
        (nn.GRU(4, 4), "recurrent layer is one fused kernel"),
        (nn.Embedding(4, 4), "a lookup without multiply-adds"),
        (nn.EmbeddingBag(4, 4), "a lookup without multiply-adds"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_that_stay_dense_have_a_reason(module, reason):
    model = Wrapped(module)
    x = torch.randn(2, 3, 4) if isinstance(module, nn.RNNBase) else torch.randint(4, (2, 3))
    gm, report = fxprop.transform(model, fxprop.Policy(rules=[fxprop.Rule(name="*", keep=0.5)]), (x,))
    (layer,) = report.layers
    assert layer.status == "skipped"
    assert reason in layer.reason
    ours, theirs = gm(x), model(x)
    assert torch.equal(ours[0], theirs[0])
    assert fxprop.code_diff(gm) == ""


def test_plain_subclass_is_a_site_of_its_base_type():
    site = sites_of(nn.Sequential(PlainSubclass(4, 4)), torch.randn(2, 4))["0"]
    assert site.skip is None
    assert site.types == ("PlainSubclass", "Linear")


@pytest.mark.parametrize(
    "make", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_parametrized_weights_are_sites(make, with_inputs):
    torch.manual_seed(0)
    model = nn.Sequential(make(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(2, 6, dtype=torch.double)
    model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gm, report = fxprop.transform(model, 0.5, (x,) if with_inputs else None)
    assert report.layers[0].status == "rewritten"
    assert report.layers[0].weight_shape == (8, 6)
    assert list(gm.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} changed"
    model.eval()
    gm.eval()
    assert torch.equal(gm(x), model(x))
    gm(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_parametrized_bias_is_used():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "bias", Double())
    model = nn.Sequential(linear, nn.Linear(4, 2))
    gm, _ = fxprop.transform(model, 0.5)
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), model(x))


@fx.wrap
def project(x, weight):
    return F.linear(x, weight) if x.sum() > 0 else -F.linear(x, weight)


def test_wrapped_functions_are_honoured_and_listed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(project(x, self.w))

    model, x = Model(), torch.randn(2, 4)
    site = {site.name: site for site in fxprop.layers(model)}
    assert "function project is kept as one call and uses w" in site["w"].skip
    # with inputs the function is seen at work (it reads values, so on real tensors)
    gm, report = fxprop.transform(model, 0.5, (x,))
    assert [(x.name, x.status) for x in report.layers] == [("w", "rewritten"), ("fc", "dense")]
    assert "reads values" in report.note
    assert torch.equal(gm(x), model(x))
    with pytest.raises(InputError, match="which have none"):
        sites_of(Model(), torch.randn(2, 4, device="meta"))


def test_products_with_parameters_are_sites():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            attention = x @ x.transpose(0, 1)  # no parameter: nothing to name
            return torch.addmm(self.b, attention @ (x @ self.w), self.w).matmul(self.w)

    model, x = Model(), torch.randn(3, 4)
    sites = sites_of(model, x)
    assert [(s.name, s.op) for s in sites.values()] == [
        ("w", "matmul"),
        ("w#2", "addmm"),
        ("w#3", "matmul"),
    ]
    report = fxprop.estimate(model, 0.5, (x,))
    assert [layer.status for layer in report.layers] == ["rewritten", "rewritten", "dense"]
    assert report.totals.other == 2 * 3 * 3 * 4  # one gradient of attention @ (x @ w)


def test_geometry_computed_in_the_graph_is_skipped():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 1, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.w, groups=x.size(1))

    site = sites_of(Model(), torch.randn(1, 4, 5, 5))["w"]
    assert site.skip == "groups is computed in the graph"


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [0, (1, 2), "same", "valid"])
@pytest.mark.parametrize("unbatched", [False, True])
def test_every_padding_of_a_module(mode, padding, unbatched):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, padding=padding, padding_mode=mode, groups=3, dilation=(1, 2)).double()
    model = nn.Sequential(conv, nn.Conv2d(6, 2, 1).double())
    x = torch.randn(*(() if unbatched else (2,)), 3, 8, 9, dtype=torch.double)
    gm, report = fxprop.transform(model, 0.5, (x,))
    assert report.layers[0].status == "rewritten"
    assert torch.equal(gm(x), model(x))
    gm(x).sum().backward()


def test_padding_that_was_changed_later_is_read_where_torch_reads_it():
    """nn.Conv2d pads by hand with numbers noted when it was made."""
    conv = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
    conv.padding = (2, 2)
    model, x = nn.Sequential(conv, nn.Conv2d(6, 2, 1)), torch.randn(2, 3, 8, 9)
    gm, report = fxprop.transform(model, 0.5, (x,))
    assert report.layers[0].status == "rewritten"
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_linear_of_any_rank(shape):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    x = torch.randn(shape)
    gm, _ = fxprop.transform(model, 0.5, (x,))
    assert torch.equal(gm(x), model(x))


def test_tied_weights_stay_tied():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    model = Model()
    gm, report = fxprop.transform(model, 0.5, (torch.randn(2, 4),))
    assert gm.a.weight is gm.b.weight is model.a.weight
    assert [layer.name for layer in report.layers] == ["a", "b", "c"]


def test_source_line_is_the_users():
    site = sites_of(Block(), torch.randn(2, 4))["w"]
    assert site.source.partition(":")[0] == __file__
    module_site = sites_of(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))["0"]
    assert module_site.source is None or "torch" not in module_site.source
