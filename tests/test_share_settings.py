"""A share for each gradient in policies, files, set_keep, schedulers and on the command line."""

import json

import pytest
from compare import equal
from small_net import always, gradients, transformed

import fxprop
from fxprop import schedules
from fxprop.cli import main as cli
from fxprop.errors import PolicyError
from fxprop.pipeline.recipe import recipe_of
from fxprop.policy.files import as_policy, to_dict, to_json, to_toml

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
