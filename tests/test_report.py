"""The numbers: against torch's counter, against loops, against each other."""

import csv
import io
import itertools
import json
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import fxprop
from fxprop.report.records import Gradients, Layer
from fxprop.report.report import Report


def measured_backward(module, *inputs):
    """What torch's counter sees when the module's backward really runs."""
    outputs = module(*inputs)
    # torch's own table has the CPU's fused attention only from 2.15 on
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {attention: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        outputs.sum().backward()
    return counter.get_total_flops()


UNGROUPED = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "vgg16": torchvision.models.vgg16,
    "vit_b_16": lambda: torchvision.models.vit_b_16(image_size=32),
}


@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("name", UNGROUPED)
def test_executed_is_what_runs(name, select):
    model = UNGROUPED[name]()
    x = torch.randn(2, 3, 32, 32)
    if name == "vgg16":
        model.classifier = nn.Sequential(nn.Linear(25088, 64), nn.ReLU(), nn.Linear(64, 10))
    gm, report = fxprop.transform(model, fxprop.Policy(keep=0.1, select=select), (x,))
    totals = report.totals
    assert totals.executed + totals.other == measured_backward(gm, x)
    assert totals.dense + totals.other == measured_backward(model, x)
    if name.startswith(("resnet", "vgg")):
        assert totals.other == 0


class Counted(nn.Module):
    """One conv between two 1x1 convs, so that it is neither first nor output."""

    def __init__(self, conv, dims):
        super().__init__()
        convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.a = convs[dims - 1](conv.in_channels, conv.in_channels, 1)
        self.conv = conv
        self.b = convs[dims - 1](conv.out_channels, 2, 1)

    def forward(self, x):
        return self.b(self.conv(self.a(x)))


def count_by_loops(conv, out_shape, kept):
    """Multiply-adds of one gradient: every kept output entry meets its inputs and kernel once."""
    batch, _, *spatial = out_shape
    multiply_adds = 0
    for _ in range(batch):
        for _ in kept:
            for _ in itertools.product(*map(range, spatial)):
                multiply_adds += (conv.in_channels // conv.groups) * len(
                    list(itertools.product(*map(range, conv.kernel_size)))
                )
    return 2 * multiply_adds


@pytest.mark.parametrize(
    ("conv", "shape", "kept"),
    [
        (nn.Conv2d(8, 12, 3, groups=4), (2, 8, 5, 6), 4 * 2),
        (nn.Conv2d(6, 6, 3, groups=6, stride=2, padding=1), (1, 6, 7, 7), 3),
        (nn.Conv2d(4, 8, (1, 3), groups=4), (2, 4, 3, 5), 4 * 1),
        (nn.Conv1d(6, 9, 2, groups=3, dilation=2), (2, 6, 9), 3 * 2),
        (nn.Conv3d(4, 8, 2, groups=2), (1, 4, 3, 3, 4), 2 * 2),
        (nn.Conv2d(3, 10, 3), (2, 3, 5, 5), 5),
    ],
)
def test_convolutions_counted_by_loops(conv, shape, kept):
    model = Counted(conv, conv.weight.dim() - 2)
    policy = fxprop.Policy(rules=[fxprop.Rule(name="conv", keep=0.5)])
    gm, report = fxprop.transform(model, policy, (torch.randn(shape),))
    layer = next(layer for layer in report.layers if layer.name == "conv")
    dense = count_by_loops(conv, layer.output_shape, range(conv.out_channels))
    sparse = count_by_loops(conv, layer.output_shape, range(kept))
    assert layer.forward == dense
    assert layer.dense.to_dict() == {"grad_input": dense, "grad_weight": dense}
    assert layer.sparse.to_dict() == {"grad_input": sparse, "grad_weight": sparse}
    assert layer.executed == layer.sparse
    assert report.totals.other == 0
    # the kernels got tensors of that size
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                seen.append((args[0].shape[1], args[9]))
            return func(*args, **(kwargs or {}))

    y = gm(torch.randn(shape))
    with Spy():
        y.sum().backward()
    assert (kept, kept if conv.groups == conv.out_channels else conv.groups) in seen


def test_element_counts_entries():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3), nn.Conv2d(3, 2, 1))
    policy = fxprop.Policy(when="always", rules=[fxprop.Rule(name="1", k=5, select="element")])
    report = fxprop.estimate(model, policy, (torch.randn(2, 2, 6, 6),))
    layer = report.layers[1]
    assert layer.n == 3 * 4 * 4
    assert layer.sparse.grad_input == 2 * 2 * 5 * (4 * 3 * 3)  # 2 examples, 5 entries, fan-in
    assert layer.executed == layer.dense
    assert "and no time is saved" in " ".join(str(report).split())


def test_what_needs_no_gradient_costs_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[1].weight.requires_grad_(False)
    x = torch.randn(3, 4)
    report = fxprop.estimate(model, 0.5, (x,))
    flops = 2 * 3 * 4 * 8
    assert report.layers[0].dense.to_dict() == {"grad_input": 0, "grad_weight": flops}
    assert report.layers[1].dense.grad_weight == 0
    assert report.layers[1].dense.grad_input > 0
    wanted = fxprop.estimate(model, 0.5, (x.requires_grad_(),))
    assert wanted.layers[0].dense.to_dict() == {"grad_input": flops, "grad_weight": flops}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    nothing = fxprop.estimate(model, 0.5, (x.detach(),))
    assert nothing.totals.dense == nothing.totals.executed == 0
    assert nothing.totals.saving == 0.0
    assert nothing.layers[0].status == "rewritten"


def test_a_layer_that_no_output_depends_on_costs_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.dead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) + self.dead(x).detach()

    report = fxprop.estimate(
        Model(), fxprop.Policy(rules=[fxprop.Rule(name="*", keep=0.5)]), (torch.ones(2, 4),)
    )
    dead = next(layer for layer in report.layers if layer.name == "dead")
    assert dead.dense.total == 0


def test_attention_products_are_other():
    model = torchvision.models.vit_b_16(image_size=32)
    policy = fxprop.Policy(keep=0.1, when="always")
    report = fxprop.estimate(model, policy, (torch.empty(2, 3, 32, 32),))
    assert [layer.status for layer in report.layers].count("rewritten") == 1 + 4 * 12
    # five products (one is computed again) in each of 12 layers: batch 2, 5 tokens, 768 features
    assert report.totals.other == 12 * 5 * (2 * 2 * 5 * 5 * 768)


# --- size and speed that follow from not computing ------------------------------------------------------


def test_ten_billion_parameters_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(32768, 32768, bias=False) for _ in range(10)])
    report = fxprop.estimate(model, 0.05, (torch.empty(16, 32768, device="meta"),))
    assert report.totals.forward == 10 * 2 * 16 * 32768**2
    assert report.layers[3].k == 1638


def test_vit_h_on_meta():
    with torch.device("meta"):
        model = torchvision.models.vit_h_14()
    report = fxprop.estimate(model, 0.05, (torch.empty(8, 3, 224, 224, device="meta"),))
    assert report.totals.dense > 10**12


# --- forms ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2), nn.Flatten(), nn.Linear(200, 2)
    )
    return fxprop.estimate(model, 0.2, (torch.empty(4, 3, 6, 6),), leaf_modules=["2"])


def test_schema(report):
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert list(data) == [
        "schema", "model", "frontend", "mode", "fxprop", "torch", "flops_per_multiply_add", "layers", "totals", "clock",
        "untraced", "examples", "policy",
    ]  # fmt: skip
    assert (data["schema"], data["flops_per_multiply_add"]) == (1, 2)
    needed = {
        "name", "op", "status", "reason", "input_shape", "weight_shape", "output_shape", "groups", "select",
        "score", "k", "n", "forward", "dense", "sparse", "executed", "select_ops",
    }  # fmt: skip
    for layer in data["layers"]:
        assert needed <= set(layer)
    assert set(data["totals"]) == {
        "forward",
        "dense",
        "sparse",
        "executed",
        "select_ops",
        "other",
        "other_executed",
        "saving",
    }
    assert [layer["status"] for layer in data["layers"]] == ["rewritten", "skipped", "dense"]


def test_totals_add_up(report):
    data = report.to_dict()
    for column in ("dense", "sparse", "executed"):
        whole = sum(layer[column]["grad_input"] + layer[column]["grad_weight"] for layer in data["layers"])
        assert data["totals"][column] == whole
    for column in ("forward", "select_ops"):
        assert data["totals"][column] == sum(layer[column] for layer in data["layers"])
    totals = data["totals"]
    assert totals["saving"] == 1 - (totals["executed"] + totals["other"]) / (
        totals["dense"] + totals["other"]
    )


def test_csv_has_exact_numbers(report):
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["name"] for row in rows] == [layer.name for layer in report.layers]
    assert sum(int(row["dense.grad_weight"]) for row in rows) == sum(
        layer.dense.grad_weight for layer in report.layers
    )
    assert rows[0]["weight_shape"] == "8x3x3x3"


def test_the_policy_is_in_the_report(report):
    assert report.to_dict()["policy"]["keep"] == 0.2
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    rule = fxprop.Rule(where=lambda site: site.name == "1", keep=0.5)
    gm, of_rule = fxprop.transform(model, fxprop.Policy(keep=0.25, rules=[rule]), (torch.ones(2, 4),))
    # a function cannot be written: the layers that it matches are named
    assert of_rule.policy["rule"] == [{"name": "1", "keep": 0.5}]
    assert fxprop.set_keep(gm, 0.75).policy["keep"] == 0.75


def test_every_form_names_every_layer_and_reason(report):
    for text in (str(report), report.to_markdown(), report.to_html()):
        assert "kept as one call because of leaf_modules" in text
        assert "output layer" in text
        assert "one multiply-add = 2 FLOPs" in text


# --- reports of many layers ---------------------------------------------------------------------------


def report_of(count, nested):
    """A report of so many layers, made without a model."""
    layers = tuple(
        Layer(
            name=f"blocks.{i // 20}.part{i % 20 // 4}.layer{i % 4}" if nested else str(i),
            op="linear",
            status="rewritten" if i % 7 else "dense",
            reason=None if i % 7 else "memory-bound",
            decided_by="default",
            input_shape=(2, 4),
            weight_shape=(4, 4),
            output_shape=(2, 4),
            groups=1,
            select="channel",
            score="l1",
            k=1,
            n=4,
            source=None,
            forward=32,
            dense=Gradients(32 + i, 32),
            sparse=Gradients(8, 8),
            executed=Gradients(8, 8),
            select_ops=3,
        )
        for i in range(count)
    )
    return Report("Model", "symbolic", "train", layers, 100)


def calls(function):
    """How many Python functions, and resumed generators, run on the way."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


FORMS = {
    "text": lambda report: report.to_text(100),
    "every layer": lambda report: report.to_text(100, "all"),
    "every column": lambda report: report.to_text(300, "all"),
    "names cut": lambda report: report.to_text(80, "all"),
    "markdown": Report.to_markdown,
    "page": Report.to_html,
    "notebook": Report._repr_html_,
    "json": Report.to_json,
    "csv": Report.to_csv,
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_work_grows_as_the_number_of_layers(form, nested):
    FORMS[form](report_of(20, nested))  # what is imported and cached on the way
    few, many = (calls(lambda n=n: FORMS[form](report_of(n, nested))) for n in (100, 800))
    assert many < 9 * few


def test_the_count_of_work_sees_what_is_quadratic():
    def quadratic(report):
        return [sum(layer.dense.total for layer in report.layers) for _ in report.layers]

    few, many = (calls(lambda n=n: quadratic(report_of(n, True))) for n in (100, 800))
    assert many > 30 * few
