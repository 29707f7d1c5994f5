"""The report as text and Markdown: grouped by module, fitting the reader's window, adding up."""

import functools
import re

import pytest
import torch
import torchvision
from torch import nn

import fxprop
from fxprop.ops.entries import available
from fxprop.report.by_module import readable_depth, rows_of
from fxprop.report.units import Unit


@functools.cache
def estimated(name, keep=0.05, **options):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(**options)
    return fxprop.estimate(model, keep, (torch.empty(8, 3, 224, 224, device="meta"),))


@pytest.fixture(scope="module")
def resnet152():
    return estimated("resnet152")


class Mixed(nn.Module):
    """Something of everything: rewritten, dense, skipped, one weight used twice, a name that cannot be short."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.ModuleDict({"a|b": nn.Conv2d(8, 8, 3, padding=1), "c": nn.Conv2d(8, 8, 1)})
        self.up = nn.ConvTranspose2d(8, 8, 2)
        setattr(self, "a_name_that_goes_on_" * 5, nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.body.values():
            x = layer(layer(x))
        x = self.up(x).mean((2, 3))
        return self.head(getattr(self, "a_name_that_goes_on_" * 5)(x))


@pytest.fixture(scope="module")
def mixed():
    rules = [fxprop.Rule(type="Linear", keep=0.5), fxprop.Rule(name="body.c", select="element")]
    policy = fxprop.Policy(keep=0.25, when="always", rules=rules)
    return fxprop.estimate(Mixed(), policy, (torch.empty(2, 3, 6, 6),), leaf_modules=["up"])


def widest(text):
    return max(map(len, text.splitlines()))


# --- golden files -----------------------------------------------------------------------------------------


def test_resnet152_in_100_columns(golden, resnet152):
    text = resnet152.to_text(width=100)
    assert widest(text) <= 100
    golden("resnet152.txt", text)


def test_resnet50_every_layer_on_a_wide_terminal(golden):
    golden("resnet50_all_160.txt", estimated("resnet50").to_text(width=160, depth="all"))


def test_something_of_everything(golden, mixed, monkeypatch):
    # without numba the report says so
    monkeypatch.setattr(available, "why_not", lambda: None)
    golden("mixed.txt", mixed.to_text(width=100))
    golden("mixed.md", mixed.to_markdown())


def test_a_golden_file_that_differs_fails(golden, request):
    if request.config.getoption("--update-golden"):
        pytest.skip("the golden files are being written")
    with pytest.raises(AssertionError, match="--update-golden"):
        golden("mixed.txt", "something else")


# --- adding up --------------------------------------------------------------------------------------------


def numbers(line):
    """The three counts of a printed line."""
    found = re.search(r"([\d,.]+) +([\d,.]+) +([\d,.]+)(?: +[\d.]+ %.*)?$", line)
    return [float(number.replace(",", "")) for number in found.groups()] if found else None


def added(text, totals="listed layers"):
    """Per column: the sum of the lines that are no subtotals, and the printed total."""
    table = text.partition("\n\n")[2].partition("\n\n")[0].splitlines()[3:]
    end = next(i for i, line in enumerate(table) if line.startswith(totals))
    lines = [line for line in table[:end] if numbers(line)]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    # a line is a subtotal if the next one is indented more
    leaves = [
        line
        for position, line in enumerate(lines)
        if position + 1 == len(lines) or indents[position + 1] <= indents[position]
    ]
    sums = [sum(column) for column in zip(*map(numbers, leaves), strict=True)]
    return sums, numbers(table[end]), len(leaves)


@pytest.mark.parametrize("depth", [1, 2, 3, "all", None])
@pytest.mark.parametrize("name", ["resnet152", "vit_b_16", "mobilenet_v3_large", "googlenet"])
def test_printed_columns_add_up_to_the_totals(name, depth):
    report = estimated(name, **({"init_weights": False, "aux_logits": True} if name == "googlenet" else {}))
    sums, totals, lines = added(report.to_text(width=80, depth=depth))
    # each printed number is at most half a digit of the last place off
    rounding = 0.5 * 10.0**-report.unit.decimals * (lines + 1)
    assert sums == pytest.approx(totals, abs=rounding)
    wanted = [getattr(report.totals, column) for column in ("dense", "sparse", "executed")]
    assert totals == [float(report.unit.text(count).replace(",", "")) for count in wanted]


def test_the_adding_can_fail(resnet152):
    text = resnet152.to_text(width=80, depth=1)
    sums, totals, _ = added(re.sub(r"^(layer2 .*?)60\.834", r"\g<1>61.834", text, flags=re.MULTILINE))
    assert sums[0] - totals[0] == pytest.approx(1, abs=0.01)


def test_subtotals_are_the_sums_of_what_is_below(resnet152):
    rows = rows_of(resnet152.layers, 2)
    heading = next(row for row in rows if row.name == "layer3")
    below = [row for row in rows if row.parents == ("layer3",)]
    assert heading.is_heading
    assert len(below) == 36
    for column in ("dense", "sparse", "executed"):
        assert heading.total(column) == sum(row.total(column) for row in below)


# --- grouping ---------------------------------------------------------------------------------------------


def test_the_deepest_level_is_collapsed():
    assert readable_depth(estimated("resnet50").layers) == 2
    assert readable_depth(estimated("vit_b_16").layers) == 3  # encoder.layers.encoder_layer_0
    assert readable_depth(estimated("vgg11").layers) == "all"  # eleven layers
    # where a level deeper would show the same lines under longer names
    assert readable_depth(estimated("mobilenet_v3_large").layers) == 2


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "densenet121", "squeezenet1_0"])
def test_every_layer_is_in_one_line_that_is_no_heading(name):
    report = estimated(name)
    for depth in (1, 2, 3, 4, "all", None):
        shown = [row for row in rows_of(report.layers, depth) if not row.is_heading]
        assert [layer.name for row in shown for layer in row.layers] == [x.name for x in report.layers]
        if depth == "all":
            assert [row.name for row in shown] == [x.name for x in report.layers]


def test_a_flat_model_of_many_layers():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])
    report = fxprop.estimate(model, 0.5, (torch.ones(2, 4),))
    assert len(rows_of(report.layers)) == 20


def test_collapsed_lines_say_so(resnet152, mixed):
    assert "--all" in resnet152.to_text(100)
    assert "--all" not in resnet152.to_text(100, depth="all")
    assert "--all" not in mixed.to_text(100)


# --- fitting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 130, 200])
@pytest.mark.parametrize("depth", [None, "all"])
def test_no_line_is_longer_than_the_window(mixed, resnet152, width, depth):
    for report in (mixed, resnet152, estimated("vit_b_16")):
        assert widest(report.to_text(width=width, depth=depth)) <= width


def test_wide_windows_show_more(mixed):
    columns = [mixed.to_text(width=width).splitlines()[2].split() for width in (80, 240)]
    assert columns[0] == ["layer", "kept", "dense", "sparse", "executed", "saved"]
    assert columns[1] == [*columns[0], "remarks", "weight", "output", "op"]


def test_print_takes_the_terminals_width(monkeypatch, resnet152):
    monkeypatch.setenv("COLUMNS", "80")
    narrow = str(resnet152)
    monkeypatch.setenv("COLUMNS", "160")
    assert narrow == resnet152.to_text(width=80)
    assert str(resnet152) == resnet152.to_text(width=160) != narrow


# --- units ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "number", "text", "name"),
    [
        (128_969_228_288, 19_267_584, "0.019", "GFLOP"),
        (1_234_567_890_123, 1_000_000_000, "0.00100", "TFLOP"),
        (999, 12, "12", "FLOP"),
        (0, 0, "0", "FLOP"),
        (1_000, 1_000, "1.00000", "kFLOP"),
        (999_999, 999_999, "999.999", "kFLOP"),
        (None, None, "-", "FLOP"),
    ],
)
def test_one_unit_for_all_numbers(largest, number, text, name):
    unit = Unit.of(largest)
    assert (unit.text(number), str(unit)) == (text, name)


def test_without_example_inputs():
    report = fxprop.transform(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 0.25).report
    text = str(report)
    assert "FLOPs were not counted" in text
    assert re.search(r"^0 +2/8 channel +- +- +- +-", text, re.MULTILINE)


def test_markdown_escapes_names():
    model = nn.Sequential()
    model.add_module("<script>|x", nn.Linear(4, 4))
    model.add_module("out", nn.Linear(4, 4))
    report = fxprop.estimate(model, 0.5, (torch.empty(2, 4),))
    assert r"<script>\|x" in report.to_markdown()
