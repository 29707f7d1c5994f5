"""One table of settings, and everything that reads it."""

import dataclasses
import typing

import pytest
import torch
from torch import nn

import fxprop
from fxprop import ops, settings
from fxprop.cli import main as cli
from fxprop.ops.keep import Keep


def fields_of(cls):
    return {field.name: field.default for field in dataclasses.fields(cls)}


def test_policies_and_rules_have_the_settings_of_the_table():
    table = {setting.name: setting.default for setting in settings.SETTINGS}
    of_all = {setting.name: setting.default for setting in settings.OF_EXAMPLES}
    own = {"rules", "allow_unmatched"}
    assert {n: d for n, d in fields_of(fxprop.Policy).items() if n not in own} == table | of_all
    of_rules = {n: d for n, d in fields_of(fxprop.Rule).items() if n in table}
    assert of_rules == dict.fromkeys(table)


def test_operators_have_the_keywords_of_the_table():
    defaults = {setting.keyword: setting.default for setting in settings.OF_LAYERS}
    keywords = ["k", "k_input", "k_weight", *defaults, "chained"]
    assert sorted(typing.get_type_hints(settings.KeepArgs)) == sorted(keywords)
    of_plans = ("k_input", "k_weight", "chained")
    assert {n: d for n, d in Keep._field_defaults.items() if n not in of_plans} == defaults
    assert sorted(Keep._fields) == sorted(keywords)


def test_the_types_list_the_words_of_the_table():
    hints = typing.get_type_hints(settings.Settings)
    for setting in settings.SETTINGS:
        words = typing.get_args(hints[setting.name])
        assert setting.choices == tuple(word for word in words if isinstance(word, str))


def test_every_default_may_be_given():
    for setting in settings.SETTINGS:
        if setting.default is not None:
            settings.check(setting.name, setting.default, "here")
            assert setting.read(str(setting.default)) in (setting.default, str(setting.default))


@pytest.mark.parametrize("name", [s.name for s in settings.SETTINGS if s.name not in ("keep", "k")])
def test_every_setting_is_an_option(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert f"--{name.replace('_', '-')}" in capsys.readouterr().out


def test_options_reach_the_report(capsys):
    assert cli.main(["report", "resnet18", "--score-fraction", "0.25", "--no-regions", "-q"]) == 0
    capsys.readouterr()
    assert cli.main(["report", "resnet18", "--score-fraction", "much", "-q"]) != 0
    assert "score_fraction='much': expected a number with 0 < x <= 1" in capsys.readouterr().err


OPERATORS = {
    "conv2d": ((1, 2, 4, 4), (3, 2, 3, 3), ("norm_grad",)),
    "conv_transpose2d": ((1, 2, 4, 4), (2, 3, 3, 3), ("norm_grad", "weight_grad", "chained")),
    "linear": ((2, 4), (3, 4), ("norm_grad", "chained")),
    "matmul": ((2, 4), (4, 3), ("norm_grad", "weight_grad", "chained", "bias_grad")),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_keyword_that_an_operator_does_not_have_is_an_error(name):
    x, w, without = OPERATORS[name]
    operator, tensors = getattr(ops, name), (torch.randn(x), torch.randn(w))
    for keyword in (*without, "keep"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            operator(*tensors, k=1, **{keyword: 1})
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'k'"):
        operator(*tensors)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(torch.relu(self.a(x) @ self.b))


def left_out(**given):
    policy = fxprop.Policy(keep=0.5, when="always", **given)
    gm, _ = fxprop.transform(Net(), policy, (torch.randn(4, 8),))
    return {name: fxprop.explain(gm, name) for name in ("a", "b")}


def test_a_setting_without_meaning_at_a_layer_is_left_out_and_told():
    of = left_out(weight_grad="row_sparse", norm_grad="kept")
    assert "weight_grad='row_sparse'" not in of["a"]
    assert "left out    weight_grad='row_sparse': what is kept is not rows of a parameter" in of["b"]
    assert "norm_grad='kept': the layer is rewritten without a batch norm" in of["a"]


def test_of_single_entries_nothing_is_summed_or_scored_in_part():
    of = left_out(select="element", sync_selection=True, score_fraction=0.5, weight_grad="row_sparse")
    assert "sync_selection=True: it applies to select='channel' only" in of["a"]
    assert "score_fraction=0.5: it applies" in of["a"]
    assert "weight_grad='row_sparse': what is kept is not rows" in of["a"]


def test_the_report_counts_what_is_left_out():
    policy = fxprop.Policy(keep=0.5, when="always", weight_grad="row_sparse")
    report = fxprop.estimate(Net(), policy, (torch.randn(4, 8),))
    why = "weight_grad='row_sparse': what is kept is not rows of a parameter"
    assert f"Ignored at 1 layers: {why}." in str(report)
    assert [layer["left_out"] for layer in report.to_dict()["layers"]] == [[], [why], []]


def test_what_is_set_to_its_default_is_not_told():
    assert all("left out" not in text for text in left_out().values())
