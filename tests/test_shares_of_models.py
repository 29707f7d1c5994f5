"""A share for each gradient in policies, whole models, reports, set_keep and schedulers."""

import copy
import itertools
import json
import types

import oracle
import pytest
import torch
from compare import equal
from test_keep import Wrapped
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxprop
from fxprop import ops, schedules
from fxprop.cli import main as cli
from fxprop.errors import PolicyError
from fxprop.inspection.decided_policy import make_decided_policy
from fxprop.pipeline.recipe import recipe_of
from fxprop.policy.files import as_policy, to_dict, to_json, to_toml


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(144, 12),
        nn.GELU(),
        nn.Linear(12, 4),
    )


IMAGES = (4, 3, 8, 8)


def gradients(module, x):
    """Of the parameters; zeros where none arrives."""
    parameters = list(module.parameters())
    found = torch.autograd.grad(module(x).square().sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def transformed(policy, model=None, **kwargs):
    torch.manual_seed(1)
    x = torch.randn(IMAGES)
    model = network() if model is None else model
    return (*fxprop.transform(model, policy, (x,), **kwargs), x)


def always(**settings):
    return fxprop.Policy(when="always", **settings)


# --- policies -----------------------------------------------------------------------------------------


def kept(policy):
    """(for grad_input, for grad_weight) of the second, third and fourth layers; None where dense."""
    layers = transformed(policy)[1].layers[1:4]
    return [None if layer.status == "dense" else (layer.k_input, layer.k_weight) for layer in layers]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep": 0.25}, [(1, 1), (4, 4), (3, 3)]),
        ({"keep": 0.25, "keep_weight": 0.5}, [(1, 2), (4, 8), (3, 6)]),
        ({"keep": 0.25, "keep_input": 0.5}, [(2, 1), (8, 4), (6, 3)]),
        ({"keep_input": 0.5, "keep_weight": 0.25}, [(2, 1), (8, 4), (6, 3)]),
        ({"keep_weight": 0.25}, [(4, 1), (16, 4), (12, 3)]),
        ({"keep": 0.25, "keep_weight": 0}, [(1, 0), (4, 0), (3, 0)]),
        ({"keep_input": 0, "keep_weight": 0}, [(0, 0), (0, 0), (0, 0)]),
        ({"keep": 0.25, "keep_input": 1, "keep_weight": 1.0}, [None, None, None]),
        ({"k": 2, "keep_input": 0.25}, [(1, 2), (4, 2), (3, 2)]),
        ({"keep": 0.1, "keep_weight": 0.2, "round_to": 3}, [(3, 3), (3, 3), (3, 3)]),
        ({"keep": 0.5, "keep_weight": 0.25, "select": "row"}, [(2, 1), (2, 1), (2, 1)]),
    ],
)
def test_shares_follow_keep_unless_they_are_given(settings, expected):
    assert kept(always(**settings)) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"keep": 0.5}, (8, 8)),
        ({"k": 3}, (3, 3)),
        ({"keep": 1.0}, None),
        ({"keep_weight": 0.75}, (4, 12)),
        ({"keep_input": 0.75}, (12, 2)),
        ({"keep": 0.5, "keep_input": 0}, (0, 8)),
    ],
)
def test_a_rule_with_a_keep_of_its_own_takes_no_share_from_the_policy(rule, expected):
    policy = always(keep=0.25, keep_weight=0.125, rules=[fxprop.Rule(name="5", **rule)])
    assert kept(policy)[1] == expected


@pytest.mark.parametrize("name", ["keep_input", "keep_weight"])
def test_shares_in_files_and_what_they_cannot_be(name, tmp_path):
    policy = always(keep=0.5, **{name: 0}, score_weight=True, rules=[fxprop.Rule(name="5", **{name: 0.25})])
    assert as_policy(to_dict(policy)) == policy
    for suffix, text in (("toml", to_toml(policy)), ("json", to_json(policy))):
        file = tmp_path / f"policy.{suffix}"
        file.write_text(text)
        assert fxprop.load_policy(file) == policy
    for wrong in (-0.1, 1.5, True, "half", float("nan")):
        with pytest.raises(PolicyError, match=rf"{name}=.*expected a number with 0 <= x <= 1"):
            fxprop.Policy(**{name: wrong})
    with pytest.raises(PolicyError, match="keep=0: expected a number with 0 < keep <= 1"):
        fxprop.Policy(keep=0)


def test_what_has_no_meaning_is_told():
    gm, report, _ = transformed(
        always(keep=0.5, score_weight=True, weight_grad="row_sparse", keep_weight=1)
    )
    assert (
        "Ignored at 4 layers: score_weight=True: it applies to select='channel' with score='l2'"
        in " ".join(str(report).split())
    )
    assert "weight_grad='row_sparse': all is kept for the weight's gradient" in fxprop.explain(gm, "5")
    policy = always(keep=0.5, score="l2", score_weight=True, norm_grad="kept")
    gm, report, _ = transformed(policy)
    assert not any(layer.region for layer in report.layers)
    text = fxprop.explain(gm, "0")
    assert "norm_grad='kept': the layer is rewritten without a batch norm" in text
    assert "for grad_input by the weight's norms as well" in text


def test_equal_shares_are_the_code_of_one():
    one = transformed(always(keep=0.25))[0].code
    assert transformed(always(keep=0.25, keep_input=0.25, keep_weight=0.25))[0].code == one
    assert "k_" not in one
    apart = transformed(always(keep=0.25, keep_weight=0.5))[0].code
    assert apart.count("k_input") == 4
    assert apart.replace(", k_input = 4", "") != one


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


# --- over training --------------------------------------------------------------------------------------


def test_set_keep_takes_shares():
    gm, _, x = transformed(always(keep=0.25))
    for given, settings in (
        ((0.5,), {"keep_weight": 0.25}),
        ((), {"keep_input": 0.5}),
        ((), {"keep_input": 0, "keep_weight": 0.5}),
        ((0.25,), {}),
    ):
        report = fxprop.set_keep(gm, *given, **settings)
        fresh, expected, _ = transformed(always(keep=given[0] if given else 0.25, **settings))
        assert report.layers == expected.layers
        assert gm.code == fresh.code
        assert list(gm.state_dict()) == list(fresh.state_dict())
        assert equal(gradients(gm, x), gradients(fresh, x))
    dense = fxprop.set_keep(gm, always(keep=0.5, keep_weight=0.1))
    assert dense.totals.saving > 0
    assert fxprop.set_keep(gm, 1.0).totals.saving == 0
    assert [layer.k_weight for layer in fxprop.set_keep(gm, keep_weight=0.25).layers[:4]] == [2, 1, 4, 3]
    with pytest.raises(PolicyError, match=r"keep_weight=2: expected a number with 0 <= x <= 1"):
        fxprop.set_keep(gm, keep_weight=2)
    with pytest.raises(PolicyError, match="give keep, keep_input, keep_weight or examples"):
        fxprop.set_keep(gm)


def test_what_rules_leave_dense_stays_dense():
    policy = always(
        keep=0.25, rules=[fxprop.Rule(name="5", keep=1.0), fxprop.Rule(name="9", keep_weight=0)]
    )
    gm, _, _ = transformed(policy)
    layers = fxprop.set_keep(gm, keep_weight=0.5).layers
    assert [layer.k_weight for layer in layers[:4]] == [4, 2, None, 6]
    layers = fxprop.set_keep(gm, 0.5).layers
    assert [(layer.k_input, layer.k_weight) for layer in layers[1:4]] == [(2, 2), (None, None), (6, 6)]


def test_a_scheduler_has_a_schedule_for_each_gradient():
    gm, _, x = transformed(always(keep=0.5))
    given = {
        "keep_weight": schedules.Linear(1.0, 0.25, steps=3),
        "keep_input": lambda step: 0.5 * (step < 3),
    }
    scheduler = fxprop.KeepScheduler(gm, schedules.Constant(0.5), levels=None, **given)
    seen = []
    for _ in range(5):
        layer = recipe_of(gm).report(True).layers[2]
        seen.append((layer.k_input, layer.k_weight))
        scheduler.step()
    assert seen == [(8, 16), (8, 12), (8, 8), (0, 4), (0, 4)]
    assert scheduler.get_last_shares() == {"keep_input": 0, "keep_weight": 0.25}
    state = json.loads(json.dumps(scheduler.state_dict()))
    again, _, _ = transformed(always(keep=0.5))
    resumed = fxprop.KeepScheduler(again, schedules.Constant(0.5), levels=None, **given)
    resumed.load_state_dict(state)
    assert again.code == gm.code
    assert equal(gradients(again, x), gradients(gm, x))
    other = {**given, "keep_weight": schedules.Constant(0.5)}
    with pytest.raises(PolicyError, match="Make the scheduler with the schedules of the checkpoint"):
        fxprop.KeepScheduler(again, schedules.Constant(0.5), levels=None, **other).load_state_dict(state)
    with pytest.raises(PolicyError, match="schedule at step 0: keep_weight=2"):
        fxprop.KeepScheduler(again, keep_weight=lambda step: 2, levels=None)


def test_a_schedule_for_one_gradient_alone():
    gm, _, _ = transformed(always(keep=0.5))
    fxprop.KeepScheduler(gm, keep_weight=schedules.Constant(0.25))
    assert [(x.k_input, x.k_weight) for x in recipe_of(gm).report(True).layers[2:4]] == [(8, 4), (6, 3)]


def test_shares_on_the_command_line(capsys):
    given = [
        "--keep-input",
        "0.5",
        "--keep-weight",
        "0",
        "--score",
        "l2",
        "--score-weight",
        "--when",
        "always",
    ]
    assert cli.main(["report", "resnet18", *given, "--format", "json", "-q"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {(layer["k_input"], layer["k_weight"]) for layer in layers[:-1]} == {
        (n, 0) for n in (32, 64, 128, 256)
    }
    assert cli.main(["report", "resnet18", "--keep-input", "2", "-q"]) == 1
    assert "keep_input=2.0: expected a number with 0 <= x <= 1" in capsys.readouterr().err
