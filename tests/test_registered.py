"""Users' own layers and functions, registered as sites."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxprop
from fxprop.errors import OpError
from fxprop.ops import Product
from fxprop.ops import registered as table


@pytest.fixture(autouse=True)
def clean_registry():
    functions, modules = dict(table._CUSTOM), dict(table._CUSTOM_MODULES)
    yield
    for registry, before in ((table._CUSTOM, functions), (table._CUSTOM_MODULES, modules)):
        registry.clear()
        registry.update(before)


class MyLinear(nn.Module):
    """Control flow that no tracer likes, around what is a linear layer."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(n_out, n_in)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        if x.isnan().any():
            raise ValueError("nan")
        return F.linear(x, self.kernel, self.shift)


class Values(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(MyLinear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        return x if x.sum().isnan() else self.body(x)


@pytest.mark.parametrize("model", [nn.Sequential(MyLinear(4, 6), nn.ReLU(), nn.Linear(6, 2)), Values()])
def test_a_module_class(model):
    fxprop.register_site(MyLinear, lambda module, x: Product("linear", x, weight="kernel", bias="shift"))
    x = torch.randn(3, 4)
    gm, report = fxprop.transform(model, 0.5, (x,))
    layer = report.layers[0]
    assert (layer.name.removeprefix("body."), layer.op, layer.status, layer.k) == (
        "0",
        "linear",
        "rewritten",
        3,
    )
    assert torch.equal(gm(x), model(x))
    by_type = fxprop.Policy(keep=0.5, rules=[fxprop.Rule(type="MyLinear", keep=0.2)])
    assert fxprop.estimate(model, by_type, (x,)).layers[0].k == 1


def test_gradients_of_a_registered_class():
    torch.manual_seed(0)
    fxprop.register_site(MyLinear, lambda module, x: Product("linear", x, weight="kernel", bias="shift"))
    registered = nn.Sequential(MyLinear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), registered.state_dict().values(), strict=True)))
    x = torch.randn(3, 4).double()
    grads = []
    for model in (registered, plain):
        fxprop.transform(model, 0.5, (x,)).module(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@fx.wrap
def project(x, w):
    return x @ w


def test_a_function():
    fxprop.register_site(project, lambda x, w: Product("matmul", x, w, constants={"weight": "right"}))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 2)

        def forward(self, x):
            return self.fc(project(x, self.w))

    model, x = Model(), torch.randn(3, 4)
    gm, report = fxprop.transform(model, 0.5, (x,))
    assert [(layer.name, layer.status) for layer in report.layers] == [("w", "rewritten"), ("fc", "dense")]
    assert "fxprop_ops_matmul" in gm.code
    assert torch.equal(gm(x), model(x))


def test_what_is_refused():
    fxprop.register_site(MyLinear, lambda module, x: Product("linnear", x, weight="kernel"))
    with pytest.raises(OpError, match="already registered"):
        fxprop.register_site(MyLinear, lambda module, x: None)
    with pytest.raises(OpError, match="op='linnear': expected one of conv1d"):
        fxprop.layers(nn.Sequential(MyLinear(4, 4)), (torch.randn(2, 4),))
