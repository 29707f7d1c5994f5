"""The torch.compile backend: names, recompiles, graph breaks, gradients as in eager mode."""

import pytest
import torch
from compare import gradients_by_name
from torch import nn

import fxprop
from fxprop.errors import ModelError, PolicyError


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
        self.w = nn.Parameter(torch.randn(8, 8))
        self.fc = nn.Linear(8, 4)
        self.breaks = breaks

    def forward(self, x):
        x = self.blocks(x).mean((2, 3)) @ self.w
        if self.breaks:
            torch._dynamo.graph_break()
        return self.fc(torch.tanh(x))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", lambda gm, inputs: gm.forward])
def test_gradients_equal_eager_ones(inner):
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 3, 8, 8).double()
    expected = gradients_by_name(model, x, fxprop.transform(model, 0.5, (x,)).module)
    backend = fxprop.backend(0.5, inner=inner)
    ours = gradients_by_name(model, x, torch.compile(model, backend=backend, fullgraph=True))
    dense = gradients_by_name(model, x, model)
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ours["blocks.0.weight"], dense["blocks.0.weight"])
    assert "fxprop_ops_conv2d" in backend.graphs[0].code


@pytest.mark.slow
def test_inductor():
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 3, 8, 8).double()
    expected = gradients_by_name(model, x, fxprop.transform(model, 0.5, (x,)).module)
    ours = gradients_by_name(model, x, torch.compile(model, backend=fxprop.backend(0.5)))
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-12)


def test_names_and_rules():
    policy = fxprop.Policy(keep=0.5, rules=[fxprop.Rule(name="blocks.2", keep=0.25)])
    backend = fxprop.backend(policy, inner="eager")
    torch.compile(Net(), backend=backend)(torch.randn(2, 3, 8, 8))
    (report,) = backend.reports
    assert [(x.name, x.op, x.k, x.n) for x in report.layers] == [
        ("blocks.0", "conv2d", 4, 8),
        ("blocks.2", "conv2d", 1, 4),
        ("w", "matmul", 4, 8),
        ("fc", "linear", None, None),
    ]
    assert report.layers[0].to_dict()["status"] == "rewritten"
    backend.check_policy()
    typo = fxprop.backend(fxprop.Policy(rules=[fxprop.Rule(name="block", keep=0.5)]), inner="eager")
    torch.compile(Net(), backend=typo)(torch.randn(2, 3, 8, 8))
    with pytest.raises(PolicyError, match="matches no layer.*blocks.0"):
        typo.check_policy()


def test_recompiles_and_dynamic_shapes():
    backend = fxprop.backend(0.5, inner="eager")
    model = Net()
    compiled = torch.compile(model, backend=backend)
    for batch in (2, 3, 4, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(compiled(x), model(x))
    assert 1 < len(backend.reports) <= 3  # one for the size seen first, then one for any
    assert len(backend.graphs) == len(backend.reports)
    assert all(report.totals.dense for report in backend.reports)


@pytest.mark.parametrize("give_model", [True, False])
def test_graph_breaks(give_model):
    torch.manual_seed(0)
    model, x = Net(breaks=True), torch.randn(2, 3, 8, 8)
    backend = fxprop.backend(0.5, inner="aot_eager", model=model if give_model else None)
    compiled = torch.compile(model, backend=backend)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert len(backend.reports) == 2
    status = {layer.name: layer.status for report in backend.reports for layer in report.layers}
    # what is last before a break is left dense, as what follows is not known
    assert status == {"blocks.0": "rewritten", "blocks.2": "rewritten", "w": "dense", "fc": "dense"}


def test_unknown_inner():
    with pytest.raises(ModelError, match="inner='inductr': expected a callable or one of .*inductor"):
        fxprop.backend(0.5, inner="inductr")
