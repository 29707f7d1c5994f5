"""The backward of part of the mini-batch as text, and what the report says of it."""

import functools
import json
import linecache
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprop
from fxprop.cli import main as cli
from fxprop.inspection.code import backward_code

HERE = f"{__name__}:"
INPUT = ("--input", "16x3x8x8")
X = torch.zeros(16, 3, 8, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))  # the end of Small


class WithLoss(Small):
    def forward(self, x):
        logits = super().forward(x)
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long, device=x.device))


class Gram(Small):
    def forward(self, x):
        hidden = super().forward(x)
        return (hidden @ hidden.T).softmax(1) @ hidden


class Centred(Small):
    def forward(self, x):
        hidden = super().forward(x)
        return hidden - hidden.mean(0)


def run(capsys, *argv):
    code = cli.main(list(argv))
    return code, *capsys.readouterr()


@functools.cache
def backward_of(model, keep=1.0):
    return backward_code(fxprop.transform(model(), fxprop.Policy(keep=keep, examples=0.5), (X,)).module)


def parts_of(text):
    """(code in front of the cut, the line of the cut, code behind it)"""
    front, cut, behind = re.split(r"^(# --- cut: .* ---)$", text, flags=re.MULTILINE)
    return front, cut, behind


def under(text, start):
    """The lines of code under each comment that begins with `start`."""
    found, inside = [], False
    for line in text.splitlines():
        if line.startswith("    # "):
            inside = line.startswith(f"    # {start}")
        elif inside:
            found.append(line)
    return "\n".join(found)


LAYERS = {
    "body.0": "aten.convolution_backward",
    "body.1": "aten.native_batch_norm_backward",
    "body.2": "aten.threshold_backward",
    "fc": "aten.mm",
}


@pytest.mark.parametrize("model", [Small, WithLoss])
def test_the_command_line_prints_it(capsys, model):
    code, out, _ = run(capsys, "code", f"{HERE}{model.__name__}", "--examples", "0.5", *INPUT, "--backward")
    assert (code, out.strip()) == (0, backward_of(model).strip())


@pytest.mark.parametrize("model", [Small, WithLoss])
def test_each_line_is_under_its_layer_and_source_line(model):
    _, _, behind = parts_of(backward_of(model))
    for layer, operator in LAYERS.items():
        assert operator in under(behind, f"{layer}, "), layer
        assert operator not in under(behind, next(name for name in LAYERS if name != layer)), layer
    comments = [line.strip() for line in behind.splitlines() if line.startswith("    # ")]
    # from the last layer to the first, and each is named once
    named = [comment[2:].partition(",")[0] for comment in comments if ", " in comment]
    assert named == ["fc", "body.2", "body.1", "body.0"]
    for comment in comments:
        file, _, number = comment.rpartition(" ")[2].rpartition(":")
        assert "# the end of Small" in linecache.getline(file, int(number)), comment


@pytest.mark.parametrize("model", [Small, WithLoss])
def test_the_text_is_code(model):
    compile(backward_of(model), "backward.py", "exec")


def test_sizes_are_n_in_front_of_the_cut_and_k_behind():
    front, cut, behind = parts_of(backward_of(WithLoss))
    assert "def backward_of_loss(" in front
    assert "[n, 8]" in front
    assert "def backward(" in behind
    assert "[k, 8, 6, 6]" in behind
    assert "k of n examples, by the norms of " in cut
    assert cut.endswith("[n, 8] ---")
    assert not re.search(r"\[k\b|\bk\]", front)
    assert not re.search(r"\[n\b|\bn\]|\bs\d+\b", behind)
    assert "aten._log_softmax_backward_data" in front
    assert "aten._log_softmax_backward_data" not in behind


def test_of_outputs_nothing_is_in_front_of_the_cut():
    front, cut, behind = parts_of(backward_of(Small))
    assert front == ""
    assert cut == "# --- cut: k of n examples, by the norms of tangents_1 [n, 8] ---"
    assert behind.count("def ") == 1


def test_channels_are_chosen_in_the_same_backward():
    text = backward_of(Small, keep=0.25)
    assert "aten.topk" in under(text, "body.0, ")
    assert re.search(r"index_select\.default\(.*\)  # \[k, 2, 6, 6\]", under(text, "body.0, "))
    assert "aten.topk" not in backward_of(Small)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("Centred", "--examples", "0.5", *INPUT), 1, r"hidden - hidden.mean\(0\)"),
        (("Gram", "--examples", "0.5", *INPUT), 1, r"hidden @ hidden.T"),
        (("Small", "--examples", "0.5", "--input", "1x3x8x8"), 1, "the example inputs have one example"),
        (("Small", *INPUT), 1, "the policy takes all examples: set examples"),
        (("Small", "--examples", "0.5", "--diff", *INPUT), 1, "--backward and --diff given"),
    ],
)
def test_what_has_no_such_backward(capsys, arguments, code, message):
    model, *options = arguments
    found, out, err = run(capsys, "code", HERE + model, "--backward", *options)
    assert (found, out) == (code, "")
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("model", "text"),
    [(Small, "# --- cut: k of n examples"), (Centred, "return hidden - hidden.mean(0)")],
)
def test_dump_and_page_have_it(tmp_path, model, text):
    gm, report = fxprop.transform(model(), fxprop.Policy(examples=0.5), (X,))
    fxprop.dump(gm, tmp_path)
    written = (tmp_path / "backward.py").read_text(encoding="utf-8")
    assert text in written
    compile(written, "backward.py", "exec")
    assert ("native_batch_norm_backward" in (tmp_path / "report.html").read_text("utf-8")) == (
        model is Small
    )
    assert text in " ".join(str(report).split()) or model is Small


def counted(model, **settings):
    report = fxprop.estimate(model, fxprop.Policy(**settings), (X,))
    return json.loads(report.to_json()), " ".join(str(report).split())


@pytest.mark.parametrize(("share", "k"), [(0.5, 8), (0.25, 4), (0.01, 2)])
def test_a_share_is_a_factor_on_everything(share, k):
    whole, _ = counted(Small(), keep=1.0)
    part, text = counted(Small(), keep=1.0, examples=share, examples_select="top")
    assert part["examples"] == {"share": share, "select": "top", "n": 16, "k": k, "off": ""}
    for layer, all_of_it in zip(part["layers"], whole["layers"], strict=True):
        for grad in ("grad_input", "grad_weight"):
            assert layer["dense"][grad] == all_of_it["dense"][grad]
            assert layer["executed"][grad] * 16 == all_of_it["dense"][grad] * k
    assert part["totals"]["saving"] == pytest.approx(1 - k / 16)
    assert f"Of the 16 examples {k} enter the backward (examples_select='top')" in text


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_loss_is_counted_without_weights(device):
    report = fxprop.estimate(WithLoss().to(device), fxprop.Policy(examples=0.5), (X.to(device),))
    assert report.examples.off == ""


def test_channels_and_examples_are_both_factors():
    channels, _ = counted(Small(), keep=0.25, when="always")
    both, _ = counted(Small(), keep=0.25, when="always", examples=0.5)
    assert both["totals"]["executed"] * 2 == channels["totals"]["executed"]
    assert both["totals"]["dense"] == channels["totals"]["dense"]


class Attends(nn.Module):
    """Products of activations are listed as `other`."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.inner(x.flatten(1).view(len(x), -1, 8))
        return self.outer((x @ x.mT) @ x)


def test_other_is_less_too():
    part, _ = counted(Attends(), keep=1.0, examples=0.5)
    assert part["totals"]["other"] > 0
    assert part["totals"]["other_executed"] * 2 == part["totals"]["other"]
    assert part["totals"]["saving"] == pytest.approx(0.5)


@pytest.mark.parametrize(("least", "k"), [(0.15, 2), (0.5, 8), (0.3, 5)])
def test_auto_is_a_range_and_counts_as_all(least, k):
    found, text = counted(Small(), keep=1.0, examples="auto", examples_least=least)
    assert found["examples"] == {"share": "auto", "select": "importance", "n": 16, "k": k, "off": ""}
    assert found["totals"]["saving"] == 0
    assert f"between {k} of 16 and all: the numbers are for all of them" in text
    assert f"with the fewest {100 * (1 - k / 16):.1f} % would be saved" in text


@pytest.mark.parametrize("share", [0.5, "auto"])
def test_of_what_is_refused_all_are_counted(share):
    found, text = counted(Centred(), keep=1.0, examples=share)
    assert "hidden - hidden.mean(0)" in found["examples"]["off"]
    assert found["totals"]["saving"] == 0
    assert f"examples={share!r} is off, and all examples enter the backward: " in text


def test_without_a_share_nothing_is_said():
    found, text = counted(Small(), keep=0.25)
    assert found["examples"] is None
    assert re.search(r"\bexamples\b(?!/)", text) is None  # but for the guide's folder
