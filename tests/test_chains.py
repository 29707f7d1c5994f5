"""Convolutions in a row, downstream computing what upstream reads: the same gradients, for less."""

import copy
import gc
import weakref

import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxprop
from fxprop.errors import OpError
from fxprop.timing.layer_times import SiteTimes

FAST = {"score": "l2", "score_fraction": 0.25, "norm_grad": "kept", "bias": "selected", "when": "always"}


class Row(nn.Module):
    """Three convolutions in a row: a chain of two regions and one without a norm behind it."""

    def __init__(self, dims=2, kernel=3, stride=1, groups=1, relu=True):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.conv1 = conv(4, 16, 3, padding=1, groups=groups)
        self.norm1 = norm(16)
        self.conv2 = conv(16, 12, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm2 = norm(12)
        self.conv3 = conv(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)
        self.relu = nn.ReLU() if relu else lambda x: x

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
        return self.head(self.conv3(x).flatten(2).mean(2))


def transformed(model, x, **changes):
    return fxprop.transform(model, fxprop.Policy(keep=0.25, **{**FAST, **changes}), (x,))


def without_chains(gm):
    """The same module with the promise taken back in its code."""
    apart = copy.deepcopy(gm)
    for node in apart.graph.nodes:
        if "chained" in node.kwargs:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "chained"}
    apart.recompile()
    assert "chained" not in apart.code
    return apart


def gradients(module, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = module(x).square().sum()
    return torch.autograd.grad(loss, [x, *module.parameters()])


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from([1, 2, 3]),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    relu=st.booleans(),
    batch=st.integers(2, 6),
    fraction=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    score=st.sampled_from(["l1", "l2"]),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_without_chains(
    dims, kernel, stride, groups, relu, batch, fraction, score, channels_last, seed
):
    torch.manual_seed(seed)
    model = Row(dims, kernel, stride, groups, relu).double()
    x = torch.randn(batch, 4, *([6] * dims), dtype=torch.float64)
    if channels_last and dims == 2:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    gm, report = transformed(model, x, score_fraction=fraction, score=score)
    assert [layer.chain for layer in report.layers] == [None, "conv1", "conv2", None]
    assert_close(gradients(gm, x), gradients(without_chains(gm), x))


def test_the_comparison_sees_another_choice():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 6, 6, dtype=torch.float64)
    model = Row().double()
    chained, _ = transformed(model, x)
    other, _ = transformed(model, x, score_fraction=0.9)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(gradients(chained, x), gradients(without_chains(other), x))


def test_report_counts_what_is_executed():
    x = torch.randn(8, 4, 6, 6)
    gm, report = transformed(Row(), x)
    loss = gm(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == report.totals.executed + report.totals.other
    conv2 = report.layers[1]
    # 2 of 8 examples whole, 4 of 16 channels of the others
    assert conv2.executed.grad_input == conv2.executed.grad_weight * (2 + 6 * 4 / 16) / 8
    assert "for conv1" in report.to_text(width=200)
    assert "Chains: 2 layers compute their input's gradient only in the channels" in str(report)


def test_chains_need_a_partial_reader_and_a_single_one():
    x = torch.empty(8, 4, 6, 6)

    def chains(model, **changes):
        return [layer.chain for layer in fxprop.estimate(
            model, fxprop.Policy(keep=0.25, **{**FAST, **changes}), (x,)).layers]  # fmt: skip

    assert chains(Row()) == [None, "conv1", "conv2", None]
    assert chains(Row(), score_fraction=1.0) == [None] * 4
    assert chains(Row(), norm_grad="full") == [None] * 4
    assert chains(Row(), regions=False) == [None] * 4
    assert chains(Row(), select="element") == [None] * 4

    class Twice(Row):
        def forward(self, x):
            x = self.relu(self.norm1(self.conv1(x)))
            y = self.relu(self.norm2(self.conv2(x)))
            return self.head(self.conv3(y).flatten(2).mean(2)) + x.mean()

    assert chains(Twice()) == [None, None, "conv2", None]


def test_chains_end_where_tuning_leaves_dense(monkeypatch):
    x = torch.randn(8, 4, 6, 6)
    gm, _ = transformed(Row(), x)
    asked = []

    def times(site, sparsity, conditions, rounds):
        asked.append((site.name, sparsity.chain))
        return SiteTimes(1.0, 2.0 if site.name == "conv1" else 0.5)

    monkeypatch.setattr("fxprop.timing.tune.time_site", times)
    report = fxprop.tune(gm, (x,))
    assert asked == [("conv1", None), ("conv2", None), ("conv3", None)]
    assert [layer.status for layer in report.layers] == ["dense", "rewritten", "rewritten", "dense"]
    assert [layer.chain for layer in report.layers] == [None, None, "conv2", None]
    assert gm.code.count("chained = True") == 1


def test_a_broken_promise_is_an_error():
    x, norm = torch.randn(4, 3, 6, 6), nn.BatchNorm2d(16)
    w1, w2 = (torch.randn(s, requires_grad=True) for s in ((16, 3, 3, 3), (8, 16, 3, 3)))
    y = fxprop.ops.conv_batch_norm(x, w1, None, norm, k=4, score_fraction=0.5, norm_grad="kept")
    z = fxprop.ops.conv2d(y, w2, k=2, chained=True)
    with pytest.raises(OpError, match="used nowhere else, but it has another use"):
        (z.sum() + y.sum()).backward()


def test_chained_where_nothing_can_be_handed_over():
    x, w = torch.randn(4, 3, 6, 6, requires_grad=True), torch.randn(8, 3, 3, 3)
    grads = [
        torch.autograd.grad(fxprop.ops.conv2d(x, w, k=2, chained=chained).square().sum(), x)[0]
        for chained in (True, False)
    ]
    assert torch.equal(*grads)


def test_several_backwards_and_parts_of_them():
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    gm, _ = transformed(Row().double(), x)
    loss = gm(x).square().sum()
    parameters = list(gm.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    # ends between downstream and upstream
    only = torch.autograd.grad(loss, gm.get_parameter("conv2.weight"), retain_graph=True)[0]
    torch.testing.assert_close(only, first[4])
    assert_close(torch.autograd.grad(loss, parameters), first)


def test_eval_mode_and_frozen_layers():
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    model = Row().double()
    gm, _ = transformed(model, x)
    gm.eval()
    assert_close(gradients(gm, x), gradients(without_chains(gm), x))
    gm.train()
    gm.get_parameter("conv1.weight").requires_grad_(False)
    gm.get_parameter("conv1.bias").requires_grad_(False)
    wanted = without_chains(gm)
    loss, other = gm(x).square().sum(), wanted(x).square().sum()
    loss.backward()
    other.backward()
    for ours, theirs in zip(gm.parameters(), wanted.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_graphs_are_freed():
    gm, _ = transformed(Row(), torch.empty(4, 4, 6, 6))
    for backward in (True, False):
        x = torch.randn(4, 4, 6, 6)
        saved = weakref.ref(x)
        y = gm(x)
        if backward:
            y.sum().backward()
        del x, y
        gc.collect()
        assert saved() is None
