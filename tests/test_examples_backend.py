"""The torch.compile backend on part of the mini-batch: gradients, other shares, several graphs, refusals."""

import shutil

import pytest
import torch
from kept_nets import whole_backward
from kept_rows import SELECTS, TOLERANCE, assert_same, differ, gradients, recorded
from torch import nn

import fxprop
from fxprop import schedules
from fxprop.errors import ExamplesError, ModelError, PolicyError

N = 8


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.pool, self.fc = nn.AvgPool2d(3), nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(self.pool(x).flatten(1))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(self.norm(x))


class Layers(nn.Module):
    """Two layers; captured in two graphs where they break."""

    def __init__(self, breaks=False):
        super().__init__()
        self.first, self.fc, self.breaks = nn.Linear(5, 8), nn.Linear(8, 3), breaks

    def forward(self, x):
        x = self.first(x).tanh()
        if self.breaks:
            torch._dynamo.graph_break()
        return self.fc(x)


class Joined(Layers):
    def forward(self, x):
        x = self.first(x)
        return self.fc(x - x.mean(0))


MODELS = {
    "images": (Images, lambda: torch.randn(N, 3, 6, 6)),
    "tokens": (Tokens, lambda: torch.randint(0, 12, (N, 5))),
}


def inputs(n=N):
    return torch.randn(n, 5, dtype=torch.float64)


def compiled(model, inner="aot_eager", **settings):
    """(the model, which is compiled from now on, its backend)"""
    policy = fxprop.Policy(**{"keep": 1.0, "examples": 0.5, **settings})
    backend = fxprop.backend(policy, inner=inner)
    model.compile(backend=backend)
    return model, backend


def check(name, inner, dtype, selects):
    build, make_inputs = MODELS[name]
    dense, x = build().to(dtype), make_inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    model = build().to(dtype)
    model.load_state_dict(dense.state_dict())
    model, backend = compiled(model, inner)
    output = dense(x)
    grad = torch.randn_like(output) * torch.rand(N, *[1] * (output.dim() - 1), dtype=dtype)
    for backend.choice.select in selects:
        with recorded(backend.choice) as taken:
            output, ours = gradients(model, [x], grad)
        ((_, *chosen),) = taken
        expected, theirs = gradients(dense, [x], grad, 0, *chosen)
        torch.testing.assert_close(output, expected)
        assert_same(ours, theirs, TOLERANCE[dtype])
        assert fxprop.kept_examples(backend) == (N // 2, N)
    assert differ(ours, gradients(dense, [x], grad)[1])  # it can fail
    (report,) = backend.reports
    assert report.examples.off == ""


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_kept_examples(name, inner):
    check(name, inner, torch.float64, SELECTS)


COMPILES = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
INDUCTOR = [pytest.mark.slow, COMPILES]


@pytest.mark.short
@pytest.mark.parametrize("name", [pytest.param(name, marks=COMPILES) for name in MODELS])
def test_gradients_by_inductor(name):
    check(name, "inductor", torch.float32, ["importance"])


@pytest.mark.parametrize("examples", [pytest.param(share, marks=INDUCTOR) for share in (1.0, 0.5)])
def test_torchs_cache_is_not_asked_for_a_backward(examples):
    # one from there would not have passed through the cut
    torch._dynamo.utils.counters.clear()
    model, _ = compiled(Layers(), "inductor", examples=examples)
    model(inputs().float()).sum().backward()
    asked = [
        key for key in torch._dynamo.utils.counters["aot_autograd"] if key.startswith("autograd_cache")
    ]
    assert bool(asked) == (examples == 1)


def captured(backend, function):
    """How many graphs the backend gets while `function` runs."""
    before = len(backend.graphs)
    function()
    return len(backend.graphs) - before


def test_another_share_or_mini_batch_compiles_nothing():
    model, backend = compiled(Layers().double())

    def step(n=N):
        model(inputs(n)).sum().backward()

    assert captured(backend, step) == 1
    for share in (1.0, "auto"):
        backend.set_examples(share)
        assert captured(backend, step) == 0
    for share, k in [(0.25, 2), (0.75, 6), (0.5, 4)]:
        backend.set_examples(share)
        assert captured(backend, step) == 0
        assert fxprop.kept_examples(backend) == (k, N)
    assert captured(backend, lambda: step(12)) == 0
    assert fxprop.kept_examples(backend) == (6, 12)


@pytest.mark.parametrize("sizes", [(1, 2, N), (N, 2, 1)])
def test_of_one_or_two_examples_all_are_kept(sizes):
    dense = Layers().double()
    model, _ = compiled(Layers().double())
    model.load_state_dict(dense.state_dict())
    for n in sizes:
        x, grad = inputs(n), torch.randn(n, 3).double()
        ours, theirs = gradients(model, [x], grad)[1], gradients(dense, [x], grad)[1]
        assert differ(ours, theirs) == (n == N)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_retain_graph(inner):
    model, backend = compiled(Layers().double(), inner)
    output = model(inputs()).sum()
    with recorded(backend.choice) as taken:
        output.backward(retain_graph=True)
        output.backward()
    assert len(taken) == 2


def test_without_gradients():
    model, backend = compiled(Layers().double())
    with torch.no_grad():
        model(inputs())
    assert fxprop.kept_examples(backend) is None
    assert backend.reports[0].examples is None
    model(inputs()).sum().backward()
    assert fxprop.kept_examples(backend) == (4, 8)


def test_schedule_of_examples():
    model, backend = compiled(Layers().double())
    scheduler = fxprop.KeepScheduler(backend, examples=schedules.Linear(1.0, 0.25, steps=3))
    kept = []
    for _ in range(4):
        model(inputs()).sum().backward()
        kept.append(fxprop.kept_examples(backend).k)
        scheduler.step()
    assert kept == [8, 6, 4, 2]
    assert len(backend.graphs) == 1
    with pytest.raises(PolicyError, match="a backend has a schedule for examples only"):
        fxprop.KeepScheduler(backend, schedules.Constant(0.5))


def test_state_of_auto():
    model, backend = compiled(Layers().double(), examples="auto")
    scheduler = fxprop.KeepScheduler(backend, examples=lambda step: "auto")
    model(inputs()).backward(lone_gradient())
    state = scheduler.state_dict()
    assert state["examples"] == {"spread": pytest.approx(7), "rested": 0}
    model, other = compiled(Layers().double(), examples="auto")
    fxprop.KeepScheduler(other, examples=lambda step: "auto").load_state_dict(state)
    model(inputs()).backward(lone_gradient())
    assert fxprop.kept_examples(other) == (2, 8)


# code in several graphs


def lone_gradient():
    """Of one example alone."""
    return torch.zeros(N, 3, dtype=torch.float64).index_fill(0, torch.tensor([2]), 1.0)


@pytest.mark.parametrize("select", SELECTS)
def test_several_graphs_take_the_same_examples(select):
    model, backend = compiled(Layers(breaks=True).double(), examples_select=select)
    grad = torch.randn(N, 3).double() * torch.rand(N, 1).double()
    with recorded(backend.choice) as taken:
        model(inputs()).backward(grad)
    assert len(backend.graphs) == 2
    at_output, at_break = (examples.tolist() for _, examples, _ in taken)
    assert at_break == at_output


@pytest.mark.parametrize("select", ["importance", "random"])
def test_several_graphs_have_the_mean_gradient_of_all_examples(select):
    dense, x = Layers().double(), inputs()
    grad = torch.randn(N, 3).double() * torch.rand(N, 1).double()
    _, expected = gradients(dense, [x], grad)
    model, _ = compiled(Layers(breaks=True).double(), examples_select=select)
    model.load_state_dict(dense.state_dict())
    draws = [gradients(model, [x], grad, seed)[1] for seed in range(300)]
    for name, mean in expected.items():
        drawn = torch.stack([found[name] for found in draws])
        error = drawn.std(0) / len(draws) ** 0.5
        assert bool(((drawn.mean(0) - mean).abs() <= 5 * error + 1e-12).all()), name


def test_auto_of_several_graphs_decides_once_a_step():
    model, backend = compiled(Layers(breaks=True).double(), examples="auto")
    decided = []
    decide = backend.choice.decide

    def noted(n):
        decided.append(decide(n))
        return decided[-1]

    backend.choice.decide = noted
    for _ in range(3):
        model(inputs()).backward(lone_gradient())
    assert decided == [(8, True), (8, False), (2, True), (2, False), (2, True), (2, False)]


@pytest.mark.parametrize("select", SELECTS)
def test_auto_of_several_graphs_learns_from_the_gradients_of_the_outputs(select):
    # alternately 1 and 3: CV^2 is 0.25
    grad = torch.tensor([1.0, 3.0]).repeat(N // 2).double()[:, None].expand(N, 3)
    spreads = []
    for breaks in (False, True):
        torch.manual_seed(0)
        model, backend = compiled(Layers(breaks).double(), examples="auto", examples_select=select)
        for _ in range(30):
            model(inputs()).backward(grad)
        spreads.append(backend.choice.state_dict()["spread"])
    assert spreads[0] == pytest.approx(0.25)
    assert spreads[1] == pytest.approx(0.25)


# what is not possible says so


@pytest.mark.parametrize("share", [0.5, "auto"])
def test_a_share_that_cannot_be_taken_is_in_the_report(share):
    dense = Joined().double()
    model, backend = compiled(Joined().double(), examples=share)
    model.load_state_dict(dense.state_dict())
    x, grad = inputs(), torch.randn(N, 3).double()
    assert_same(gradients(model, [x], grad)[1], gradients(dense, [x], grad)[1], 1e-9)
    (report,) = backend.reports
    assert "return self.fc(x - x.mean(0))" in report.examples.off
    assert f"examples={share!r} is off, and all examples enter the backward" in " ".join(
        str(report).split()
    )
    assert fxprop.kept_examples(backend) is None


@pytest.mark.parametrize("inner", ["cudagraphs", lambda gm, inputs: gm.forward])
def test_other_compilers_cannot_take_a_share(inner):
    with pytest.raises(ModelError, match=r"with examples=0\.5: expected one of inductor, aot_eager, eager"):
        fxprop.backend(fxprop.Policy(examples=0.5), inner=inner)


def test_what_cannot_be_set():
    with pytest.raises(ExamplesError, match="this backend was made for all examples"):
        fxprop.backend(0.5, inner="eager").set_examples(0.5)
    with pytest.raises(
        PolicyError, match="examples=0: expected a number with 0 < examples <= 1, or 'auto'"
    ):
        fxprop.backend(fxprop.Policy(examples=0.5)).set_examples(0)


def test_a_backward_that_runs_on_all_examples_is_an_error(monkeypatch):
    monkeypatch.setattr("fxprop.compact.compile.CutBackward", whole_backward)
    model, _ = compiled(Layers().double())
    output = model(inputs()).sum()
    with pytest.raises(ExamplesError, match=r"examples=0\.5 was asked for, but the backward ran on all"):
        output.backward()
