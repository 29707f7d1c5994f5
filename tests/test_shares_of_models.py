"""A share for each gradient in whole models: their gradients, what is computed, and what reports say."""

import copy
import itertools
import types

import oracle
import pytest
import torch
from compare import equal
from small_net import IMAGES, always, gradients, network, transformed
from test_keep import Wrapped
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxprop
from fxprop import ops
from fxprop.inspection.decided_policy import make_decided_policy
from fxprop.pipeline.recipe import recipe_of

# --- whole models ---------------------------------------------------------------------------------------


def mask_apart(module, of_input, of_weight):
    """The module's product twice: for its input's gradient, and for the weight's and the bias's."""
    everything = oracle.Keep(keep=1.0)

    def product(keep):
        if isinstance(module, nn.Linear):
            return oracle.masked_linear(keep or everything)
        conv = oracle.masked_conv(2, keep or everything)
        return lambda *operands: conv(
            *operands, module.stride, module.padding, module.dilation, module.groups
        )

    def forward(self, x):
        weight, bias, fixed = self.weight, self.bias, self.weight.detach()
        first = product(of_input)(x if of_input else x.detach(), fixed, None)
        second = product(of_weight)(x.detach(), weight if of_weight else fixed, bias)
        if bias is not None:
            first = first + bias.detach().view([-1] + [1] * (first.dim() - 2))
        return first + (second - second.detach())

    module.forward = types.MethodType(forward, module)


def by_hand(keep_input, keep_weight, x, **settings):
    model = network().double()
    for module in list(model)[:-1]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            shares = (keep_input, keep_weight)
            mask_apart(module, *(oracle.Keep(keep=k, **settings) if k else None for k in shares))
    return oracle.gradients(model, [x])


@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("shares", [(0.25, 0.5), (0.5, 0.25), (0.5, 0), (1.0, 0.25), (0.25, 1.0), (0, 0.5)])
@pytest.mark.parametrize("bias", ["full", "selected"])
def test_the_gradients_of_a_network_are_those_by_hand(select, shares, bias):
    policy = always(keep_input=shares[0], keep_weight=shares[1], select=select, bias=bias, score="l2")
    torch.manual_seed(2)
    x = torch.randn(IMAGES, dtype=torch.float64)
    gm, _ = fxprop.transform(network().double(), policy, (x,))
    ours = oracle.gradients(gm, [x])
    theirs = by_hand(*shares, x, select=select, bias=bias, score="l2")
    if bias == "selected" and shares[1] == 0:
        for name in list(ours[0]):
            if name.endswith("bias") and name.split(".")[0] in ("3", "5", "9"):
                assert ours[0].pop(name) is None
                theirs[0].pop(name)
    if shares[0] == 0:  # nothing upstream of the last but one layer gets a gradient
        reached = ("9.", "11.")
        assert all((grad is None) != name.startswith(reached) for name, grad in ours[0].items())
        assert ours[1] == [None]
        ours, theirs = (
            ({n: g for n, g in of[0].items() if n.startswith(reached)}, []) for of in (ours, theirs)
        )
    oracle.assert_same_gradients(ours, theirs)


def test_the_comparison_above_can_fail():
    torch.manual_seed(2)
    x = torch.randn(IMAGES, dtype=torch.float64)
    gm, _ = fxprop.transform(network().double(), always(keep_input=0.25, keep_weight=0.5), (x,))
    oracle.assert_same_gradients(oracle.gradients(gm, [x]), by_hand(0.25, 0.5, x))
    for wrong in ((0.5, 0.25), (0.25, 0.25), (0.5, 0.5)):
        with pytest.raises(AssertionError, match="not close"):
            oracle.assert_same_gradients(oracle.gradients(gm, [x]), by_hand(*wrong, x))


@pytest.mark.parametrize("shares", [(1, 3), (3, 1), (0, 2), (2, 0)])
def test_a_chain_hands_over_what_is_kept_for_grad_input(shares):
    torch.manual_seed(0)
    x = torch.randn(8, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    first, second = (torch.randn(8, c, 3, 3, dtype=torch.float64, requires_grad=True) for c in (4, 8))
    settings = {"score": "l2", "score_fraction": 0.25, "norm_grad": "kept"}
    found = []
    for chained, ks in ((True, shares), (False, shares), (False, shares[::-1])):
        norm = nn.BatchNorm2d(8).double()
        hidden = ops.conv_batch_norm(x, first, None, norm, activation="relu", k=4, k_weight=2, **settings)
        y = ops.conv2d(hidden, second, k=3, k_input=ks[0], k_weight=ks[1], chained=chained)
        wanted = (x, first, norm.weight, second)
        found.append(torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True))
    for ours, theirs in zip(*found[:2], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    assert not equal(found[1], found[2])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_have_the_same_gradients(backend):
    torch._dynamo.reset()
    rules = [fxprop.Rule(name="3", score="l2", score_weight=True), fxprop.Rule(name="9", keep_weight=0)]
    gm, _, x = transformed(always(keep=0.25, keep_weight=0.5, rules=rules))
    twin = copy.deepcopy(gm)
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    for ours, theirs in zip(gradients(compiled, x), gradients(twin, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_decided_policy_gives_the_same_code():
    for policy in (
        always(keep=0.25, keep_weight=0.5),
        always(keep=0.25, keep_weight=0, score="l2", score_weight=True),
        always(keep_input=0, keep_weight=0),
        always(keep=0.3, keep_weight=0.6, select="row"),
    ):
        gm, report, _ = transformed(policy)
        again, of_again, _ = transformed(make_decided_policy(recipe_of(gm)))
        assert again.code == gm.code
        assert [x.executed for x in of_again.layers] == [x.executed for x in report.layers]


def test_part_of_the_examples_and_a_share_for_each_gradient():
    gm, _, x = transformed(always(keep=0.5, keep_weight=0.25, examples=0.5))
    found = gradients(gm, x)
    assert fxprop.kept_examples(gm).k == 2
    assert all(grad.any() for grad in found)


# --- nothing at all ------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.after = (nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.body(x).relu()
        return self.head(self.after(x).relu())


def counted(gm, *inputs):
    output = gm(*inputs)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("layers", "unreached"),
    [
        (["body"], []),
        (["after"], ["stem", "body"]),
        (["head"], ["stem", "body", "after"]),
        (["body", "after"], ["stem", "body"]),
    ],
)
def test_what_lies_in_front_of_a_layer_without_grad_input_costs_nothing(layers, unreached):
    x = torch.randn(5, 6)
    rules = [fxprop.Rule(name=name, keep_input=0) for name in layers]
    gm, report = fxprop.transform(Residual(), always(keep=0.5, rules=rules), (x,))
    found = {layer.name: layer for layer in report.layers}
    assert [name for name, layer in found.items() if not layer.reached] == unreached
    assert all(found[name].executed.total == 0 for name in unreached)
    assert counted(gm, x) == report.totals.executed + report.totals.other
    for name, parameter in gm.named_parameters():
        assert (parameter.grad is None) == (name.split(".")[0] in unreached)
    assert ("No gradient arrives at" in str(report)) == bool(unreached)
    assert report.totals.saving > fxprop.estimate(Residual(), always(keep=0.5), (x,)).totals.saving


def test_nothing_at_all_is_no_question_of_time():
    model = nn.Sequential(
        nn.Conv2d(512, 512, 1), nn.ReLU(), nn.Conv2d(512, 512, 1), nn.Flatten(), nn.Linear(512 * 64, 2)
    )
    x = torch.randn(4, 512, 8, 8)
    policy = fxprop.Policy(keep=0.97, rules=[fxprop.Rule(name="2", keep_input=0)])
    first, second, _ = fxprop.estimate(model, policy, (x,)).layers
    assert (first.status, first.reached) == ("dense", False)
    assert (second.status, second.k_input) == ("rewritten", 0)
    gm, _ = fxprop.transform(model, policy, (x,))
    layers = fxprop.tune(gm, (x,), rounds=1, margin=0.99).layers
    assert layers[1].status == "rewritten"


def test_nothing_at_all_can_be_tuned():
    nothing = always(keep_input=0, keep_weight=0, bias="selected")
    gm, report, x = transformed(nothing)
    assert [layer.status for layer in fxprop.tune(gm, (x,), rounds=1).layers] == [
        layer.status for layer in report.layers
    ]


@pytest.mark.parametrize("settings", [{"keep_input": 0.5, "keep_weight": 0}, {"keep_input": 0}])
def test_products_in_code_without_a_graph_have_shares(settings):
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    policy = always(keep=0.25, rules=[fxprop.Rule(name="w", **settings)])
    gm, report = fxprop.transform(Wrapped(), policy, (x,))
    gm(x).sum().backward()
    nothing = {"w"} if settings.get("keep_weight") == 0 else set()
    nothing |= {"body.0", "body.2"} if settings["keep_input"] == 0 else set()
    for name, parameter in gm.named_parameters():
        layer = name.removesuffix(".weight").removesuffix(".bias")
        assert (parameter.grad is None) == (layer in nothing)
    assert {layer.name for layer in report.layers if not layer.reached} == nothing - {"w"}
    shown = "8+0/16" if settings["keep_input"] else "0+4/16"
    assert f"w: {shown} channel" in repr(gm)


# --- numbers -------------------------------------------------------------------------------------------


def multiply_adds(channels, x, conv):
    """By loops: one for every output position of the channels, input channel of the group and tap."""
    count = 0
    y = conv(x)
    taps = list(itertools.product(*map(range, conv.kernel_size)))
    for _ in range(len(x)):
        for _ in range(channels):
            for _ in itertools.product(*map(range, y.shape[2:])):
                for _ in range(conv.in_channels // conv.groups):
                    for _ in taps:
                        count += 1
    return count


def test_flops_are_those_of_loops_and_of_what_runs():
    gm, report, x = transformed(always(keep=0.25, keep_weight=0.5, regions=False))
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    layer = report.layers[1]
    hidden = torch.randn(4, 8, 8, 8)
    assert (layer.k_input, layer.k_weight, layer.n) == (1, 2, 4)
    assert layer.sparse.grad_input == 2 * multiply_adds(2 * 1, hidden, conv)
    assert layer.sparse.grad_weight == 2 * multiply_adds(2 * 2, hidden, conv)
    for layer in report.layers:
        assert layer.executed == layer.sparse
    # groups are counted otherwise by torch
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)
    )
    for policy in (
        always(keep=0.25, keep_weight=0.5),
        always(keep=0.5, keep_input=0.25, score="l2", score_weight=True),
        always(keep=0.5, keep_weight=0),
    ):
        gm, report, x = transformed(policy, plain)
        assert counted(gm, x) == report.totals.executed + report.totals.other


def test_the_report_says_what_is_kept_for_which():
    _, report, _ = transformed(always(keep=0.25, keep_weight=0.5))
    assert "4+8/16 channel" in str(report)
    assert "Layers with a share for each gradient, kept for grad_input + grad_weight: 4." in str(report)
    layer = report.to_dict()["layers"][2]
    assert (layer["k"], layer["k_input"], layer["k_weight"], layer["reached"]) == (8, 4, 8, True)
    for form in (report.to_markdown(), report.to_html(), report.to_csv()):
        assert "4+8/16" in form or "k_weight" in form


def test_less_of_one_gradient_is_expected_to_be_faster():
    x = torch.empty(16, 64, 56, 56, device="meta")
    with torch.device("meta"):
        model = nn.Sequential(
            *[m for _ in range(3) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())],
            nn.Flatten(),
            nn.Linear(64 * 56 * 56, 2),
        )
    shares = [(0.25, 0.25), (0.25, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    speeds = []
    for of_input, of_weight in shares[:-1]:
        policy = fxprop.Policy(keep_input=of_input, keep_weight=of_weight)
        speeds.append(fxprop.estimate(model, policy, (x,)).clock.backward)
    assert speeds == sorted(speeds, reverse=True)
    nothing = [fxprop.Rule(name="4", keep_input=0, keep_weight=0)]
    assert fxprop.estimate(model, fxprop.Policy(rules=nothing), (x,)).clock.backward > speeds[0]


def test_fidelity_of_shares():
    gm, _, x = transformed(always(keep=0.5, keep_weight=1.0))
    y = torch.arange(4) % 4
    batches = [(x, y), (x + 1, y)]
    found = fxprop.fidelity(gm, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    assert found.overall.cosine < 1
    fxprop.set_keep(gm, always(keep=0.5, keep_input=1.0, keep_weight=0))
    found = fxprop.fidelity(gm, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    rows = {row.name: row for row in found.rows}
    assert (rows["5"].norm, rows["11"].norm) == (0, 1)
