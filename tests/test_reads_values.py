"""Models that read values: run for real once, and held to with what they read."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from compare import assert_unchanged, snapshot
from coverage_oracle import gradients_equal
from torch import nn

import fxprop
from fxprop.errors import InputError
from fxprop.tracing.observe import answers
from fxprop.tracing.observe.twin import Twin


class Experts(nn.Module):
    """Which expert sees a row depends on the data: real inputs are needed to see it run."""

    def __init__(self):
        super().__init__()
        self.route = nn.Linear(6, 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        chosen = self.route(x).argmax(-1)
        y = torch.zeros_like(x)
        for expert in chosen.unique():
            rows = (chosen == expert).nonzero()[:, 0]
            y = y.index_add(0, rows, F.linear(x[rows], self.experts[expert]))
        return self.head(y)


def test_a_model_that_reads_values_runs_on_the_inputs_given():
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(20, 6)
    before = snapshot(model)
    gm, report = fxprop.transform(model, 0.5, (x,))
    assert_unchanged(model, before)
    experts = [layer for layer in report.layers if layer.name.startswith("experts")]
    assert sum(layer.input_shape[0] for layer in experts) == 20
    assert {(layer.status, layer.k, layer.n) for layer in experts} == {("rewritten", 3, 6)}
    assert "The model reads values" in str(report)
    assert torch.equal(gm(x), model(x))
    assert gradients_equal(model, 0.5, (x,), {}) == "equal"
    with pytest.raises(InputError, match="Pass real example inputs"):
        fxprop.transform(model, 0.5, (x.to("meta"),))


class Detector(nn.Module):
    """Masks, values and sizes that depend on the data, with gradients through them, in a mode of its own each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        features = self.body(x).flatten(2).mT.flatten(0, 1)
        certain = features.sum(1) > features.sum(1).mean()
        y = self.head(features[certain])
        if float(y.detach().abs().max()) > 1e6:
            y = y.tanh()
        if not self.training:
            best = y.sum(1).argsort()[: int(certain.sum()) // 2]
            return y[best][torchvision.ops.nms(y[best].abs().cumsum(1), y[best, 0], 0.5)]
        return y[torch.where(y[:, 0] > y[:, 0].mean())[0]]


@torch.library.custom_op("fxprop_tests::without_a_rule", mutates_args=())
def without_a_rule(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy() * x.numpy().sum())


class CustomOperator(nn.Module):
    """Calls an operator that fake tensors know nothing of."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(without_a_rule(x)).relu())


@pytest.fixture
def real_runs(monkeypatch):
    """The modes in which models have run on real tensors."""
    runs, running = [], Twin.running

    def noted(twin, training=None):
        if twin.real:
            runs.append(training)
        return running(twin, training)

    monkeypatch.setattr(Twin, "running", noted)
    return runs


@pytest.mark.parametrize("model", [Experts, CustomOperator, Detector])
def test_a_model_that_reads_values_runs_for_real_once_in_a_mode(model, real_runs):
    torch.manual_seed(0)
    model, x = model(), torch.randn(2, 3, 12, 12) if model is Detector else torch.randn(20, 6)
    gm, report = fxprop.transform(model, fxprop.Policy(keep=0.5, when="always"), (x,))
    assert real_runs == ([True, False] if isinstance(model, Detector) else [True])
    assert "The model reads values" in str(report)
    assert torch.equal(gm(x), model(x))
    assert gradients_equal(model, 0.5, (x,), {}) == "equal"


@pytest.mark.parametrize(
    "wrong", [lambda made: None, lambda made: torch.cat([made, made]) if made.dim() else made]
)
def test_where_an_answer_is_wrong_there_is_a_second_run(wrong, monkeypatch, real_runs):
    torch.manual_seed(0)
    model, x = Detector(), torch.randn(2, 3, 12, 12)
    given_again = fxprop.estimate(model, 0.5, (x,)).to_json()
    assert real_runs == [True, False]
    made = answers._made
    monkeypatch.setattr(
        answers,
        "_made",
        lambda noted: wrong(made(noted)) if isinstance(noted, answers._Noted) else made(noted),
    )
    assert fxprop.estimate(model, 0.5, (x,)).to_json() == given_again
    assert real_runs == [True, False, True, True, False, False]
