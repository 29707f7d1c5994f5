"""Defects that were there once: a test for each, with an oracle of its own."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxprop
from fxprop import ops
from fxprop.errors import OpError, PolicyError
from fxprop.ops import scores as select
from fxprop.ops.keep import Keep
from fxprop.ops.kernels import one_pass as fused
from fxprop.ops.regions.conv_batch_norm import conv_batch_norm
from fxprop.ops.scores import channel_scores
from fxprop.ops.selections import SELECTIONS
from fxprop.tracing.source_lines import source_line, users_stack


@pytest.fixture
def score(monkeypatch):
    """Registers a score for one test, and returns its name."""
    monkeypatch.setattr(select, "_SCORES", dict(select._SCORES))

    def register(function):
        ops.register_score("of_the_test", function)
        return "of_the_test"

    return register


def columns(weight):
    """The output features whose weight got a gradient."""
    return weight.grad.abs().sum(0).nonzero().flatten().tolist()


# --- registered scores and single elements ------------------------------------------------------------


SMALLEST = {
    "amax": lambda g, dims: -g.abs().amax(dims),
    "sum": lambda g, dims: -g.abs().sum(dims),
    "norm": lambda g, dims: -torch.linalg.vector_norm(g, 2, dims),
    "mean": lambda g, dims: -g.square().mean(dims),
}


@pytest.mark.parametrize("smallest", SMALLEST)
@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 2, 3)])
def test_a_registered_score_chooses_the_entries_it_ranks_highest(score, smallest, shape):
    torch.manual_seed(0)
    grad = torch.randn(shape)
    name = score(SMALLEST[smallest])
    if len(shape) == 2:
        x, weight = torch.eye(5, requires_grad=True), torch.randn(12, 5)
        y = ops.linear(x, weight, k=3, select="element", score=name)
    else:
        x, weight = torch.randn(3, 4, 2, 3), torch.eye(4)[:, :, None, None]
        y = ops.conv2d(x.requires_grad_(), weight, k=3, select="element", score=name)
    y.backward(grad)
    expected = torch.zeros(shape).flatten(1)
    for row, entries in zip(expected, grad.flatten(1).tolist(), strict=True):
        for place in sorted(range(len(entries)), key=lambda i, e=entries: abs(e[i]))[:3]:
            row[place] = entries[place]
    masked = expected.view(shape)
    torch.testing.assert_close(x.grad, masked @ weight if len(shape) == 2 else masked)


def test_a_score_gets_dims_that_it_can_compare_with_positions(score):
    shapes = []

    def constant(grad, dims):
        shapes.append((tuple(grad.shape), dims))
        return torch.zeros([size for dim, size in enumerate(grad.shape) if dim not in dims])

    name = score(constant)
    for how in ("channel", "element"):
        weight = torch.randn(6, 4, requires_grad=True)
        ops.linear(torch.randn(3, 4), weight, k=2, select=how, score=name).sum().backward()
    assert shapes == [((3, 6), (0,)), ((3, 6, 1), (2,))]


# --- grouped_mm ---------------------------------------------------------------------------------------


def chosen_by_experts(grad, sizes, k, fraction, score):
    """The features that each expert keeps, by loops over the first of its rows."""
    kept, start = [], 0
    for size in sizes:
        rows = grad[start : start + math.ceil(fraction * size)]
        ranks = [score(rows[:, feature]).item() for feature in range(grad.shape[1])]
        best = sorted(range(grad.shape[1]), key=lambda feature, r=ranks: -r[feature])[:k]
        kept.append(sorted(best) if size else [])
        start += size
    return kept


SCORES = {
    "l1": (None, lambda column: column.abs().sum()),
    "l2": (None, lambda column: column.square().sum()),
    "largest": (lambda g, dims: g.abs().amax(dims), lambda column: column.abs().max()),
}


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("sizes", [(8, 4, 12), (0, 13, 0), (1, 0, 9)])
def test_experts_are_scored_by_the_first_of_their_own_rows(score, sizes, name, fraction):
    torch.manual_seed(0)
    function, expected = SCORES[name]
    rows = sum(sizes) + 2  # the last two belong to no expert
    x, w = torch.randn(rows, 16), torch.randn(3, 16, 8, requires_grad=True)
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    # what comes later is larger, and must not count
    grad = torch.randn(rows, 8) * torch.linspace(1, 100, rows)[:, None]
    used = score(function) if function else name
    ops.grouped_mm(x, w, offs=offs, k=3, score=used, score_fraction=fraction).backward(grad)
    kept = [expert.abs().sum(0).nonzero().flatten().tolist() for expert in w.grad]
    assert kept == chosen_by_experts(grad, sizes, 3, fraction, lambda c: expected(c) if len(c) else c.sum())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.fc = nn.Parameter(torch.randn(2, 16, 16)), nn.Linear(16, 4)
        self.register_buffer("offs", torch.tensor([4, 10], dtype=torch.int32))

    def forward(self, x):
        return self.fc(F.grouped_mm(x, self.weight, offs=self.offs))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_registered_score_on_experts_after_a_transform(score, compiled):
    name = score(lambda g, dims: -g.abs().amax(dims))
    # the dtype that torch's own grouped_mm compiles in
    model, x = Experts().bfloat16(), torch.randn(10, 16, dtype=torch.bfloat16)
    gm, report = fxprop.transform(model, fxprop.Policy(keep=0.5, score=name, when="always"), (x,))
    assert [(layer.op, layer.score) for layer in report.listed[:1]] == [("grouped_mm", name)]
    (torch.compile(gm, backend="aot_eager") if compiled else gm)(x).square().sum().backward()
    assert all(
        len(expert.abs().sum(0).nonzero()) == 8 for expert in dict(gm.named_parameters())["weight"].grad
    )


# --- what is counted is what is read ------------------------------------------------------------------


def one_layer(name):
    return {
        "linear": (nn.Linear(6, 8), torch.randn(7, 6)),
        "tokens": (nn.Linear(6, 8), torch.randn(5, 3, 6)),
        "conv": (nn.Conv2d(4, 8, 3), torch.randn(7, 4, 5, 6)),
        "grouped": (nn.Conv1d(4, 8, 3, groups=2), torch.randn(3, 4, 9)),
        "depthwise": (nn.Conv1d(4, 4, 3, groups=4), torch.randn(3, 4, 9)),
        "unbatched": (nn.Conv1d(4, 8, 3), torch.randn(4, 9)),
        "transposed": (nn.ConvTranspose1d(4, 8, 3), torch.randn(3, 4, 9)),
    }[name]


@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
@pytest.mark.parametrize(
    "name", ["linear", "tokens", "conv", "grouped", "depthwise", "unbatched", "transposed"]
)
def test_the_report_counts_the_entries_that_a_score_gets(score, name, fraction):
    read = []

    def counting(grad, dims):
        read.append(grad.numel())
        return grad.abs().amax(dims)

    layer, x = one_layer(name)
    rule = fxprop.Rule(regex=".*", k=1)
    policy = fxprop.Policy(score=score(counting), score_fraction=fraction, when="always", rules=[rule])
    gm, report = fxprop.transform(nn.Sequential(layer), policy, (x.requires_grad_(),))
    gm(x).sum().backward()
    (counted,) = report.layers
    channels = 4 if name == "depthwise" else 8
    assert counted.select_ops == 2 * sum(read) + channels
    (decision,) = fxprop.pipeline.recipe.recipe_of(gm).plans[True].decisions
    assert SELECTIONS["channel"].scored(decision.site.axes, decision.sparsity) == sum(read)


def test_experts_are_counted_by_their_rows():
    policy = fxprop.Policy(keep=0.5, score_fraction=0.5, when="always")
    report = fxprop.estimate(Experts(), policy, (torch.randn(10, 16),))
    assert report.layers[0].select_ops == 2 * 5 * 16 + 2 * 16


# --- score="random" -----------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def test_random_scores_draw_and_read_nothing():
    with Seen() as seen:
        channel_scores(torch.randn(64, 8), (0,), Keep(3, "channel", "random"))
    assert seen.names == ["randn", "rand"]
    with Seen() as seen:
        channel_scores(torch.randn(64, 8), (0,), Keep(3, "channel", "l1"))
    assert "sum" in seen.names


def test_random_regions_make_no_pass_for_scores(monkeypatch):
    def no_pass(*_, **__):
        raise AssertionError("a pass over the gradient")

    monkeypatch.setattr(fused, "compute_sums", no_pass)
    monkeypatch.setattr(fused, "compute_in_pieces", no_pass)
    x, conv, norm = torch.randn(2, 3, 5, 5), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    run = functools.partial(conv_batch_norm, x, conv.weight, None, norm, k=2, norm_grad="kept")
    run(score="random").sum().backward()
    with pytest.raises(AssertionError, match="a pass over the gradient"):
        run(score="l2").sum().backward()

    x, fc = torch.randn(5, 6), nn.Linear(6, 8)
    run = functools.partial(
        ops.linear_activation, x, fc.weight, fc.bias, activation="relu", k=2, bias_grad="selected"
    )
    run(score="random").sum().backward()
    with pytest.raises(AssertionError, match="a pass over the gradient"):
        run(score="l2").sum().backward()


def test_random_regions_draw_as_single_layers_do():
    x = torch.randn(5, 6, dtype=torch.float64)
    kept = []
    for fuse in (True, False):
        weight = torch.ones(9, 6, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)
        if fuse:
            y = ops.linear_activation(x, weight, activation="gelu", k=3, score="random")
        else:
            y = F.gelu(ops.linear(x, weight, k=3, score="random"))
        y.sum().backward()
        kept.append(columns_of_rows(weight))
    assert kept[0] == kept[1]
    assert len(kept[0]) == 3


def columns_of_rows(weight):
    """The output features of a linear layer whose weight got a gradient."""
    return weight.grad.abs().sum(1).nonzero().flatten().tolist()


@pytest.mark.parametrize(("how", "operations"), [("channel", 8 + 8), ("element", 2 * 5 * 8)])
def test_random_costs_a_draw_for_each_candidate(how, operations):
    policy = fxprop.Policy(rules=[fxprop.Rule(regex=".*", k=2)], score="random", select=how, when="always")
    report = fxprop.estimate(nn.Sequential(nn.Linear(6, 8)), policy, (torch.randn(5, 6),))
    assert report.layers[0].select_ops == operations


# --- failures of a compiler, and others ---------------------------------------------------------------


@pytest.fixture
def working(monkeypatch):
    """Fusing as in a new process."""
    monkeypatch.setattr(fused, "_broken", [])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError, KeyboardInterrupt])
def test_what_fails_in_a_run_is_raised(working, monkeypatch, error):
    def run(*_):
        raise error("not enough memory")

    monkeypatch.setattr(fused, "_compile", lambda formula: run)
    with pytest.raises(error, match="not enough memory"):
        fused.call_compiled(torch.sin, torch.ones(3))
    assert not fused._broken


def unsupported(x):
    torch._dynamo.graph_break()
    return x + 1


def test_what_fails_in_compiling_switches_fusing_off(working, caplog):
    assert fused.call_compiled(unsupported, torch.ones(3)) is None
    assert "cannot compile on this machine" in caplog.text
    assert not fused.compiles(torch.ones(2**20))


@pytest.mark.parametrize("error", [RuntimeError, PermissionError])
def test_a_platform_without_compiler_switches_fusing_off(working, monkeypatch, error):
    def refuse(*_, **__):
        raise error("not on this platform")

    if error is RuntimeError:
        monkeypatch.setattr(torch, "compile", refuse)
    else:  # of the cache on disk
        monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    fused._compile.cache_clear()
    assert fused.call_compiled(lambda x: x, torch.ones(3)) is None
    fused._compile.cache_clear()
    assert fused._broken == [f"{error.__name__}: not on this platform"]


# --- paths and errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "machinery"),
    [
        ("/home/me/torch_net.py", "/env/lib/torch/nn/modules/linear.py"),
        (r"C:\me\torch_net.py", r"C:\env\Lib\torch\nn\modules\linear.py"),
        (r"C:\me\torch_net.py", r"C:\env\Lib\fxprop\tracing\symbolic.py"),
    ],
)
def test_the_users_line_is_found_in_paths_of_every_system(user, machinery):
    trace = (
        f'  File "{user}", line 12, in forward\n    y = fc(x)\n  File "{machinery}", line 9, in f\n    z'
    )
    assert source_line(trace) == f"{user}:12"
    assert users_stack(trace) == f'  File "{user}", line 12, in forward\n    y = fc(x)'


UNKNOWN = r"unknown score 'l3': expected one of l1, l2, random.*fxprop.ops.register_score"


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3), k=1, score="l3"),
        lambda: ops.conv1d(torch.ones(2, 3, 5), torch.ones(4, 3, 1), k=1, score="l3"),
        lambda: ops.matmul(torch.ones(2, 3), torch.ones(3, 4), k=1, score="l3"),
        lambda: ops.grouped_mm(
            torch.ones(2, 8),
            torch.ones(1, 8, 8),
            offs=torch.tensor([2], dtype=torch.int32),
            k=1,
            score="l3",
        ),
    ],
)
def test_an_unknown_score_is_an_operators_error(call):
    with pytest.raises(OpError, match=UNKNOWN):
        call()


@pytest.mark.parametrize(
    "make", [lambda: fxprop.Policy(score="l3"), lambda: fxprop.Rule(name="a", score="l3")]
)
def test_an_unknown_score_is_a_policys_error_in_a_policy(make):
    with pytest.raises(PolicyError, match=UNKNOWN):
        make()
