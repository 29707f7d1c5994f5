"""The front-ends find the same sites, make the same plan and give the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprop


class Random(nn.Module):
    """A small network drawn at random: layers, a residual or a branch here and there, one or two heads."""

    def __init__(self, kinds, heads):
        super().__init__()
        self.layers = nn.ModuleList()
        for kind in kinds:
            self.layers.append(
                {
                    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
                    "grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
                    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
                    "norm": lambda: nn.BatchNorm2d(4),
                    "linear": lambda: nn.Linear(5, 5),
                    "frozen": lambda: nn.Linear(5, 5).requires_grad_(False),
                    "residual": lambda: nn.Conv2d(4, 4, 1),
                }[kind]()
            )
        self.kinds = kinds
        self.w = nn.Parameter(torch.randn(5, 3))
        self.heads = nn.ModuleList([nn.Linear(3, 2) for _ in range(heads)])

    def forward(self, x):
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            x = x + layer(x) if kind == "residual" else torch.relu(layer(x))
        x = x @ self.w
        return tuple(head(x) for head in self.heads) if len(self.heads) > 1 else self.heads[0](x)


def facts(report):
    keys = ("name", "status", "input_shape", "weight_shape", "output_shape", "groups", "select", "k", "n")
    layers = report.to_dict()["layers"]
    numbers = ("forward", "dense", "sparse", "executed", "select_ops")
    return [{key: layer[key] for key in (*keys, *numbers)} for layer in layers], report.totals


KINDS = st.sampled_from(["conv", "grouped", "transposed", "norm", "linear", "frozen", "residual"])


@settings(max_examples=12, deadline=None)
@given(kinds=st.lists(KINDS, min_size=0, max_size=5), heads=st.integers(1, 2), training=st.booleans())
def test_on_random_networks(kinds, heads, training):
    torch.manual_seed(0)
    model, x = Random(kinds, heads).train(training), torch.randn(2, 4, 5, 5)
    found = {
        frontend: facts(fxprop.estimate(model, 0.5, (x,), frontend=frontend))
        for frontend in ("symbolic", "submodules", "export")
    }
    assert found["submodules"] == found["symbolic"]
    assert found["export"] == found["symbolic"]
    backend = fxprop.backend(0.5, inner="eager")
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    assert facts(backend.reports[0]) == found["symbolic"]


def test_the_comparison_can_fail():
    model, x = Random(["conv", "linear"], 1), torch.randn(2, 4, 5, 5)
    first, second = (facts(fxprop.estimate(model, keep, (x,))) for keep in (0.5, 0.9))
    assert first != second


@pytest.mark.parametrize("frontend", ["symbolic", "submodules", "export"])
def test_forward_and_gradients_by_every_frontend(frontend):
    torch.manual_seed(0)
    model, x = Random(["conv", "norm", "residual", "linear"], 2).double(), torch.randn(2, 4, 5, 5).double()
    reference = fxprop.transform(model, 0.5, (x,)).module
    gm, report = fxprop.transform(model, 0.5, (x,), frontend=frontend)
    assert report.frontend == frontend
    assert list(gm.state_dict()) == list(model.state_dict())
    model.eval(), gm.eval(), reference.eval()  # running statistics would differ between the calls
    assert all(torch.equal(a, b) for a, b in zip(gm(x), model(x), strict=True))
    grads = []
    for module in (gm, reference):
        sum(y.square().sum() for y in module(x)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.fc(self.embed(ids))))


def test_a_tied_output_layer_stays_dense_by_every_frontend():
    ids = torch.tensor([[1, 2], [3, 4]])
    for frontend in ("symbolic", "submodules"):
        report = fxprop.estimate(Tied(), 0.5, (ids,), frontend=frontend)
        status = {layer.name: layer.status for layer in report.layers}
        assert status == {"embed": "skipped", "fc": "rewritten", "head": "dense"}
    backend = fxprop.backend(0.5, inner="eager")
    torch._dynamo.reset()
    torch.compile(Tied(), backend=backend)(ids)
    assert {layer.name: layer.status for layer in backend.reports[0].layers} == {
        "fc": "rewritten",
        "head": "dense",
    }


def test_exported_programs_and_aten_graphs():
    model, x = Random(["conv", "linear"], 1), torch.randn(2, 4, 5, 5)
    program = torch.export.export(model, (x,), strict=False)
    expected = facts(fxprop.estimate(model, 0.5, (x,)))
    assert facts(fxprop.estimate(program, 0.5, (x,))) == expected
    decomposed = program.run_decompositions()
    report = fxprop.estimate(decomposed, 0.5, (x,))
    assert report.totals.dense == expected[1].dense
    assert report.totals.other == 0
    assert {layer.op for layer in report.layers} <= {"conv2d", "addmm", "matmul"}
    gm, _ = fxprop.transform(decomposed, 0.5, (x,))
    torch.testing.assert_close(gm(x), model(x))
    gm(x).sum().backward()


def test_a_view_of_a_weight_is_its_site_and_a_product_of_activations_none():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.heads = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 2, 3))

        def forward(self, x):
            y = torch.einsum("nd,dhk->nhk", F.linear(x @ self.w, self.w), self.heads)
            return y @ y.transpose(1, 2)

    report = fxprop.estimate(
        Views(), fxprop.Policy(rules=[fxprop.Rule(name="*", keep=0.5)]), (torch.randn(2, 4),)
    )
    assert [(x.name, x.op, x.n) for x in report.layers] == [
        ("w", "matmul", 6),
        ("w#2", "linear", 4),
        ("heads", "einsum", 6),
    ]
