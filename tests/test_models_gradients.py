"""Whole models: every gradient equals the oracle's; keep = 1 equals the dense model's."""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxprop

KEEPS = [
    oracle.Keep(keep=0.1),
    oracle.Keep(keep=0.3, score="l2", bias="selected"),
    oracle.Keep(keep=0.05, select="element"),
    oracle.Keep(keep=0.1, round_to=4),
]


def policy_of(keep):
    return fxprop.Policy(
        keep=keep.keep,
        select=keep.select,
        score=keep.score,
        bias=keep.bias,
        round_to=keep.round_to,
        when="always",
    )


class Net1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 12, 5, stride=2, padding=2, padding_mode="circular")
        self.body = nn.Sequential(
            nn.BatchNorm1d(12), nn.GELU(), nn.Conv1d(12, 24, 3, padding="same", dilation=2, groups=3)
        )
        self.head = nn.Linear(24, 7)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).transpose(1, 2))


class Net3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(2, 8, 3, padding=1, padding_mode="replicate", bias=False)
        self.b = nn.Conv3d(8, 8, (1, 2, 2), groups=8, padding="same")
        self.c = nn.Conv3d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = self.c(torch.tanh(self.b(x)) + x)
        return self.fc(
            x.square().mean((2, 3, 4))
        )  # a plain mean would give every position the same gradient


def small_inputs(name):
    torch.manual_seed(1)
    return {
        "net1d": (torch.randn(2, 3, 17, dtype=torch.double),),
        "net3d": (torch.randn(2, 2, 4, 5, 6, dtype=torch.double),),
    }.get(name, (torch.randn(2, 3, 40, 40, dtype=torch.double),))


MODELS = {
    "resnet18": (torchvision.models.resnet18, ["fc"]),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, ["classifier.3"]),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, ["fc"]),
    "net1d": (Net1d, ["head"]),
    "net3d": (Net3d, ["fc"]),
}


def make(name):
    torch.manual_seed(0)
    factory, outputs = MODELS[name]
    model = factory().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, outputs


@pytest.mark.parametrize("keep", KEEPS, ids=["channel", "l2-selected", "element", "rounded"])
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_equals_the_oracle(name, keep):
    model, outputs = make(name)
    inputs = small_inputs(name)
    expected_model = copy.deepcopy(model)
    names = oracle.mask_model(expected_model, keep, except_for=outputs)
    gm, report = fxprop.transform(model, policy_of(keep), inputs)
    considered = {layer.name for layer in report.layers if layer.reason != "output layer"}
    assert considered == set(names)
    assert any(layer.status == "rewritten" for layer in report.layers)
    oracle.assert_same_gradients(oracle.gradients(gm, inputs), oracle.gradients(expected_model, inputs))


def test_a_wrong_oracle_is_noticed():
    model, outputs = make("resnet18")
    inputs = small_inputs("resnet18")
    wrong = copy.deepcopy(model)
    oracle.mask_model(wrong, oracle.Keep(keep=0.12), except_for=outputs)
    gm, _ = fxprop.transform(model, policy_of(oracle.Keep(keep=0.1)), inputs)
    with pytest.raises(AssertionError, match="not close"):
        oracle.assert_same_gradients(oracle.gradients(gm, inputs), oracle.gradients(wrong, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_keep_one_is_the_dense_model(name):
    model, _ = make(name)
    inputs = small_inputs(name)
    dense = copy.deepcopy(model)
    gm, report = fxprop.transform(model, 1.0, inputs)
    assert all(layer.status == "dense" for layer in report.layers)
    assert fxprop.code_diff(gm) == ""
    oracle.assert_same_gradients(
        oracle.gradients(gm, inputs), oracle.gradients(dense, inputs), atol=0, rtol=0
    )


class FunctionalNet(nn.Module):
    """Every functional form: positional, keyword, computed and shared weights."""

    def __init__(self, conv2d=F.conv2d, linear=F.linear):
        super().__init__()
        self.conv2d, self.linear = conv2d, linear
        generator = torch.Generator().manual_seed(0)

        def weight(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.double) / 3)

        self.first = weight(8, 3, 3, 3)
        self.second, self.second_bias = weight(8, 8, 1, 1), weight(8)
        self.depthwise = weight(8, 1, 3, 3)
        self.shared, self.head = weight(10, 10), weight(4, 10)
        self.project = weight(10, 8)

    def forward(self, x):
        x = torch.relu(self.conv2d(x, self.first, None, 2, 1))
        x = self.conv2d(x, self.second * 0.5, bias=self.second_bias) + x
        x = self.conv2d(input=x, weight=self.depthwise, padding="same", groups=8)
        x = self.linear(x.square().mean((2, 3)), self.project)
        x = self.linear(torch.tanh(self.linear(x, self.shared)), self.shared)
        return self.linear(x, self.head)


@pytest.mark.parametrize("select", ["channel", "element"])
def test_functional_model(select):
    keep = oracle.Keep(keep=0.4, select=select)
    inputs = (torch.randn(2, 3, 9, 9, dtype=torch.double),)
    gm, report = fxprop.transform(FunctionalNet(), policy_of(keep), inputs)
    names = [layer.name for layer in report.layers]
    assert names == ["first", "second", "depthwise", "project", "shared", "shared#2", "head"]
    assert [layer.status for layer in report.layers] == ["rewritten"] * 6 + ["dense"]

    class Expected(FunctionalNet):
        def forward(self, x):
            # the output layer is dense
            calls = iter([self.linear, self.linear, self.linear, F.linear])
            inner, self.linear = self.linear, lambda *a: next(calls)(*a)
            try:
                return super().forward(x)
            finally:
                self.linear = inner

    expected = Expected(oracle.masked_conv(2, keep), oracle.masked_linear(keep))
    oracle.assert_same_gradients(oracle.gradients(gm, inputs), oracle.gradients(expected, inputs))


def test_frozen_parts_get_no_gradient():
    model, outputs = make("resnet18")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
    inputs = small_inputs("resnet18")
    expected_model = copy.deepcopy(model)
    oracle.mask_model(expected_model, oracle.Keep(keep=0.2), except_for=outputs)
    gm, _ = fxprop.transform(model, policy_of(oracle.Keep(keep=0.2)), inputs)
    oracle.assert_same_gradients(oracle.gradients(gm, inputs), oracle.gradients(expected_model, inputs))
    assert gm.conv1.weight.grad is None
