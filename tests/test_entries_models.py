"""The compiled loops over kept entries in models: compiled, exported, planned and reported."""

import pytest
import torch
from torch import nn

import fxprop

pytest.importorskip(
    "numba", reason="numba is not installed, and the loops need it: pip install 'fxprop[sparse]'"
)

from fxprop.ops.entries import available, product_loops
from fxprop.ops.entries.operator import entry_gradients

pytestmark = pytest.mark.usefixtures("whatever_is_set")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.linear = nn.Linear(8, 32)

    def forward(self, x):
        return self.linear(self.up(self.conv(x).relu()).relu().mean((2, 3)))


def sparse_net():
    torch.manual_seed(0)
    policy = fxprop.Policy(
        keep=0.1, select="element", when="always", rules=[fxprop.Rule(name="linear", k=5)]
    )
    return fxprop.transform(Net(), policy, (torch.randn(2, 3, 8, 8),))[0]


def step(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_and_for_any_batch(forced, backend):
    torch._dynamo.reset()
    model = sparse_net()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch in (3, 5):
        x = torch.randn(batch, 3, 8, 8)
        for ours, theirs in zip(step(compiled, x), step(model, x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert forced


def test_exported_with_a_free_batch(forced):
    model = sparse_net()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), model(x))


CALLS = {
    "a convolution": ((4, 6, 5, 5), (4, 3, 5, 5), (6, 3, 3, 3), [1, 1]),
    "a linear layer": ((6, 8), (6, 5), (8, 5), []),
    "no example": ((0, 8), (0, 5), (8, 5), []),
    "no output feature": ((6, 0), (6, 5), (0, 5), []),
    "no input channel": ((4, 6, 5, 5), (4, 0, 5, 5), (6, 0, 3, 3), [1, 1]),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [0, 5])
def test_torch_accepts_the_operator(call, layout, k):
    *shapes, ones = CALLS[call]
    tensors = [LAYOUTS[layout](torch.randn(shape)) for shape in shapes]
    constants = (ones, ones, ones, False, 1, 1, [True, True, True])
    torch.library.opcheck(entry_gradients, (*tensors, None, k, *constants))


@pytest.mark.parametrize("padding", [0, 1])
def test_the_report_counts_what_the_loops_multiply(forced, monkeypatch, padding):
    counted = []

    def count(name, lengths_and_entries):
        loop = getattr(product_loops, name)

        def counting(*args):
            lengths, entries = lengths_and_entries(*args)
            counted.append(int(lengths.sum()) * int(entries.sum()))
            return loop(*args)

        monkeypatch.setattr(product_loops, name, counting)

    def of_rows(lengths, starts, first, last):
        return lengths, starts[:, last] - starts[:, first]

    def of_moved_rows(*args):
        return of_rows(args[5][6], args[5][8], *args[6:8])

    def of_moved_examples(*args):
        first, last = args[9:11]
        return args[5][7], args[8][first:last] - args[7][first:last]

    count("add_to_rows", lambda *args: of_rows(args[7], *args[9:12]))
    count("add_and_move_rows", of_moved_rows)
    count("add_and_move_examples", of_moved_examples)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 96, 3, padding=padding),
        nn.Conv2d(96, 96, 3, padding=padding),
        nn.Flatten(),
        nn.LazyLinear(10),
    )
    x = torch.randn(8, 3, 28, 28)
    model(x)
    gm, report = fxprop.transform(model, fxprop.Policy(keep=0.05, select="element", when="always"), (x,))
    gm(x).square().sum().backward()
    executed = [layer.executed for layer in report.layers]
    assert [layer.status for layer in report.layers] == ["rewritten", "rewritten", "dense"]
    assert sum(counted) * 2 == sum(of.grad_input + of.grad_weight for of in executed[:2])
    assert "2 layers compute with the kept entries alone, by compiled loops" in str(report)


def test_without_numba_nothing_changes_but_the_kernels(monkeypatch):
    monkeypatch.setenv("FXPROP_SPARSE", "0")
    x = torch.randn(64, 512)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    gm, report = fxprop.transform(model, fxprop.Policy(keep=0.05, select="element"), (x,))
    assert report.layers[0].executed == report.layers[0].dense
    assert "no time is saved (FXPROP_SPARSE=0 is set)" in " ".join(str(report).split())
    grads = step(gm, x)
    monkeypatch.setenv("FXPROP_SPARSE", "always")
    for ours, theirs in zip(grads, step(gm, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_policy_of_what_is_not_zero_needs_no_keep(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3)
    )
    x = torch.randn(4, 3, 20, 20)
    gm, report = fxprop.transform(model, fxprop.Policy(select="nonzero"), (x,))
    assert [layer.status for layer in report.layers] == ["rewritten", "rewritten", "dense"]
    assert "select='nonzero' at 2 layers: the gradients are the dense ones" in " ".join(str(report).split())
    for ours, theirs in zip(step(gm, x), step(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    monkeypatch.setenv("FXPROP_SPARSE", "0")
    report = fxprop.estimate(model, fxprop.Policy(select="nonzero"), (x,))
    assert {layer.reason for layer in report.layers} == {"FXPROP_SPARSE=0 is set"}


def test_explain_says_by_what_entries_are_computed(monkeypatch):
    model = nn.Sequential(nn.Linear(768, 1024), nn.Linear(1024, 64), nn.Linear(64, 4))
    shape = (torch.empty(1000, 768, device="meta"),)
    gm, _ = fxprop.transform(
        model.to("meta"),
        fxprop.Policy(select="element", keep=0.02, when="always", rules=[fxprop.Rule(name="1", keep=0.9)]),
        shape,
    )
    assert "kernels     compiled loops (numba) over the kept entries alone" in fxprop.explain(gm, "0")
    assert "kernels     the dense kernels, on the mask: expected to be faster" in fxprop.explain(gm, "1")
    monkeypatch.setenv("FXPROP_SPARSE", "0")
    assert "kernels     the dense kernels, on the mask: FXPROP_SPARSE=0 is set" in fxprop.explain(gm, "0")


def test_a_layer_that_would_lose_is_dense_or_masked_as_the_policy_says():
    model = nn.Sequential(nn.Conv2d(64, 256, 1), nn.Conv2d(256, 64, 1), nn.Conv2d(64, 4, 1))
    x = torch.empty(8, 64, 56, 56, device="meta")
    reports = [
        fxprop.estimate(model, fxprop.Policy(select="element", keep=0.05, when=when), (x,))
        for when in ("faster", "always")
    ]
    first = [report.layers[0] for report in reports]
    assert [layer.status for layer in first] == ["dense", "rewritten"]
    assert "entries are too many for what each saves: predicted 0." in first[0].reason
    # slower than dense kernels, but not than those with the selection in front
    assert first[1].executed == first[1].sparse


def test_a_convolution_has_to_promise_more_than_it_would_alone():
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 4, 1))
    x = torch.empty(8, 32, 56, 56, device="meta", requires_grad=True)
    first, _ = fxprop.estimate(model, fxprop.Policy(select="element", keep=0.05), (x,)).layers
    assert first.status == "dense"
    assert "predicted 1.2x where 1.3x is asked for" in first.reason


def test_a_layer_that_is_smaller_than_the_call_costs_is_left_dense():
    model = nn.Sequential(nn.Conv2d(96, 4, 1), nn.Conv2d(4, 96, 1), nn.Conv2d(96, 4, 1))
    x = torch.empty(8, 96, 1, 1, device="meta")  # of a squeeze and excitation
    report = fxprop.estimate(model, fxprop.Policy(select="element", keep=0.05), (x,))
    assert [layer.status for layer in report.layers] == ["dense"] * 3
    assert "when='always' rewrites it anyway" in report.layers[1].reason


def test_under_autocast_the_report_counts_the_dense_kernels():
    model, x = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 10)), torch.randn(64, 512)
    with torch.autocast("cpu", torch.bfloat16):
        gm, report = fxprop.transform(
            model, fxprop.Policy(keep=0.02, select="element", when="always"), (x,)
        )
        nonzero = fxprop.estimate(model, fxprop.Policy(select="nonzero"), (x,))
    assert report.layers[0].executed == report.layers[0].dense
    assert f"on the mask: {available.UNKNOWN}" in fxprop.explain(gm, "0")
    assert nonzero.layers[0].reason == available.UNKNOWN
