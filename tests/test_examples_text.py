"""What is shown of a backward on part of the mini-batch: its code, the report, the folder, the page."""

import re

import pytest
import torch
from kept_nets import Joined, Net, inputs, make

import fxprop
from fxprop.cli.main import main
from fxprop.errors import ExamplesError
from fxprop.inspection.code import backward_code


def test_the_code_names_layers_lines_and_counts():
    _, gm, _ = make()
    code = backward_code(gm)
    assert re.search(r"^# --- cut: k of n examples, by the norms of tangents_1 \[n, 3\] ---$", code, re.M)
    assert re.search(r"^def backward\(.*tangents_1.*\):$", code, re.M)
    for layer in ("first", "middle.0", "fc"):
        assert re.search(rf"^    # {re.escape(layer)}, .*kept_nets\.py:\d+$", code, re.M), layer
    assert re.search(r"aten\.mm\.default\(.*\)  # \[k, 8\]$", code, re.M)
    assert "def backward_of_loss" not in code


def test_the_code_of_a_loss_is_in_front_of_the_cut():
    class Losing(Net):
        def forward(self, x):
            return torch.nn.functional.cross_entropy(super().forward(x), torch.arange(len(x)) % 3)

    _, gm, _ = make(Losing())
    loss, cut, kept = re.split(r"^(# --- cut.*)$", backward_code(gm), flags=re.M)
    assert "def backward_of_loss" in loss
    assert "[n, 3]" in loss
    assert "[n, 3]" in cut
    assert "[k, 8]" in kept


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"model": Net, "examples": 1.0}, "the policy takes all examples: set examples"),
        ({"model": Net, "inputs": None}, "transform had no example_inputs to look at it with"),
        ({"model": Joined}, "of some of the examples: it gives a sum over the examples back"),
    ],
)
def test_why_there_is_no_such_code(given, reason):
    policy = fxprop.Policy(examples=given.get("examples", 0.5))
    x = None if "inputs" in given else (inputs(),)
    gm, _ = fxprop.transform(given["model"]().double(), policy, x)
    with pytest.raises(ExamplesError, match=re.escape(reason)):
        backward_code(gm)


def test_on_the_command_line(capsys):
    model = ["kept_nets:Net", "--input", "6x5", "--examples", "0.5", "-q"]
    assert main(["code", *model, "--backward"]) == 0
    assert "# --- cut: k of n examples" in capsys.readouterr().out
    assert main(["code", *model, "--backward", "--diff"]) == 1
    assert "--backward and --diff given: give one of them" in capsys.readouterr().err
    assert main(["report", *model]) == 0
    assert "Of the 6 examples 3 enter the backward" in capsys.readouterr().out
    assert main(["report", *model, "--format", "html"]) == 0
    assert "# --- cut: k of n examples" in capsys.readouterr().out


def test_the_folder_has_it(tmp_path):
    _, gm, _ = make()
    fxprop.dump(gm, tmp_path)
    assert (tmp_path / "backward.py").read_text(encoding="utf-8") == backward_code(gm)


def test_counts_are_those_of_the_part():
    model, x = Net(), torch.randn(6, 5)
    _, dense = fxprop.transform(model, fxprop.Policy(), (x,))
    _, half = fxprop.transform(model, fxprop.Policy(examples=0.5), (x,))
    assert half.totals.executed * 2 == half.totals.dense == dense.totals.executed
    assert half.totals.saving == pytest.approx(0.5)
    assert half.to_dict()["examples"] == {"share": 0.5, "select": "importance", "n": 6, "k": 3, "off": ""}
    assert dense.to_dict()["examples"] is None


def test_auto_is_a_range_with_its_assumption():
    _, report = fxprop.transform(
        Net(), fxprop.Policy(examples="auto", examples_least=1 / 3), (torch.randn(6, 5),)
    )
    assert report.totals.saving == 0
    text = " ".join(str(report).split())
    assert "between 2 of 6 and all: the numbers are for all of them, which is how training begins" in text
    assert "with the fewest 66.7 % would be saved" in text
