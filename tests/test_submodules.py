"""Models that cannot be traced whole: the largest parts that can, the rest as it is written."""

import copy
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from compare import assert_unchanged, snapshot
from coverage_oracle import gradients_equal
from torch import nn

import fxprop
from fxprop.errors import InputError, TraceError
from fxprop.graph.rewrite import is_rewritten
from fxprop.inspection.code import generated_code
from fxprop.tracing.module.traced_module import TracedModule


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Block(nn.Module):
    """Traceable, called with one tensor."""

    scale = 0.5

    def __init__(self, features):
        super().__init__()
        self.up, self.down = nn.Linear(features, 2 * features), nn.Linear(2 * features, features)

    def forward(self, x):
        return x + self.scale * self.down(torch.relu(self.up(x)))

    def describe(self):
        return f"block of {self.up.out_features}"


class Model(nn.Module):
    """Reads a value, takes options, returns a dataclass, computes its own loss."""

    name = "example"

    def __init__(self, features=6):
        super().__init__()
        self.embed = nn.Embedding(11, features)
        self.blocks = nn.ModuleList([Block(features) for _ in range(2)])
        self.w = nn.Parameter(torch.randn(features, features) / 3)
        self.norm = nn.LayerNorm(features)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(features, 11)

    def forward(self, ids, labels=None, *, repeat=1, options=None):
        x = self.embed(ids)
        if x.shape[1] > 100:
            return None
        for block in self.blocks:
            for _ in range(repeat):
                x = block(x)
        if (x > 1e9).any():
            return None
        x = self.norm(x @ self.w)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits, loss)

    def generate(self, ids):
        return self(ids).logits.argmax(-1)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
KWARGS = {"ids": IDS, "labels": IDS}


def made(policy=0.5, **kwargs):
    torch.manual_seed(0)
    model = Model()
    gm, report = fxprop.transform(model, policy, example_kwargs={**KWARGS, **kwargs})
    return model, gm, report


def test_the_result_is_the_model_with_graph_modules_inside():
    model, gm, report = made()
    assert type(gm).__mro__[2] is Model  # its own class, with the products of its code replaced
    assert isinstance(gm, Model)
    assert gm.name == "example"
    assert report.frontend == "submodules"
    assert isinstance(gm.blocks[0], TracedModule)
    assert isinstance(gm.blocks[0], Block)
    assert gm.blocks[0].describe() == "block of 12"
    assert "fxprop_ops_linear(x, up_weight, up_bias, k = 6" in gm.blocks[0].code
    assert list(gm.state_dict()) == list(model.state_dict())
    for name, parameter in model.named_parameters():
        assert gm.get_parameter(name) is parameter
    assert gm(**KWARGS).loss.equal(model(**KWARGS).loss)
    assert gm(IDS).loss is None
    assert gm.generate(IDS).equal(model.generate(IDS))
    gm.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(gm.state_dict(), strict=True)


def test_the_report_is_one_table_and_says_what_has_no_graph():
    _, _, report = made()
    assert [(x.name, x.status, x.graph) for x in report.layers] == [
        ("embed", "skipped", "embed"),
        ("blocks.0.up", "rewritten", "blocks.0"),
        ("blocks.0.down", "rewritten", "blocks.0"),
        ("blocks.1.up", "rewritten", "blocks.1"),
        ("blocks.1.down", "rewritten", "blocks.1"),
        ("w", "rewritten", ""),
        ("head", "dense", "head"),
    ]
    assert report.layers[-1].reason == "output layer"
    assert report.layers[5].op == "matmul"
    assert report.layers[5].source.startswith(__file__)
    assert report.totals.other == 0
    assert [name for name, _ in report.untraced] == [""]
    assert "x.shape[1] > 100" in report.untraced[0][1]
    assert "runs as written" in str(report)
    assert report.to_dict()["untraced"][0]["reason"] == report.untraced[0][1]


def test_gradients_are_the_oracles():
    torch.manual_seed(0)
    assert gradients_equal(Model(), 0.5, (), KWARGS) == "equal"


def test_python_values_stay_free():
    model, gm, _ = made()
    for kwargs in ({"repeat": 3}, {"labels": None}, {"options": {"a": [None]}}):
        ours, theirs = gm(IDS, **kwargs), model(IDS, **kwargs)
        assert ours.logits.equal(theirs.logits)


def test_a_part_that_is_called_twice_is_two_sites_decided_alike():
    _, gm, report = made(repeat=2)
    names = [layer.name for layer in report.layers]
    assert names[1:5] == ["blocks.0.up", "blocks.0.down", "blocks.0.up#2", "blocks.0.down#2"]
    assert len({layer.k for layer in report.layers if layer.name.startswith("blocks.0.up")}) == 1
    assert gm(**KWARGS, repeat=2).logits.shape == (2, 3, 11)

    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            if x.sum().isnan():
                return x
            return self.fc(torch.relu(self.fc(x)))

    report = fxprop.estimate(Ends(), 0.5, (torch.randn(2, 4),))
    assert [layer.status for layer in report.layers] == ["dense", "dense"]
    assert report.layers[0].reason == "shares its code with fc#2, which stays dense: output layer"


def test_copies_and_restore():
    model, gm, _ = made()
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert twin(**KWARGS).loss.equal(gm(**KWARGS).loss)
        assert twin.blocks[0].code.count("fxprop_ops_linear") == 2
        assert twin.head.weight is not gm.head.weight
        twin.eval().train()
        assert twin(**KWARGS).loss.equal(gm(**KWARGS).loss)
    dense = fxprop.restore(gm)
    assert type(dense) is Model
    assert dense.head.weight is model.head.weight
    assert "fxprop_ops" not in dense.blocks[0].code
    assert "fxprop_ops" in gm.blocks[0].code
    assert dense(**KWARGS).loss.equal(model(**KWARGS).loss)
    with pytest.raises(fxprop.FxpropError, match="already transformed"):
        fxprop.transform(gm, 0.5, example_kwargs=KWARGS)
    again = fxprop.transform(dense, 0.5, example_kwargs=KWARGS)
    assert again.report.totals == made()[2].totals


def test_the_model_given_is_left_alone():
    torch.manual_seed(0)
    model, floats = Model(), torch.randn(2, 3)
    before = snapshot(model)
    fxprop.transform(model, 0.5, example_kwargs=KWARGS)
    assert_unchanged(model, before)
    with pytest.raises(InputError, match="cannot run on"):
        fxprop.transform(model, 0.5, (floats,))
    assert_unchanged(model, before)


def test_code_and_diff_are_grouped_by_module():
    _, gm, _ = made()
    assert re.findall("^# (.*)$", generated_code(gm), re.MULTILINE) == ["blocks.0", "blocks.1", "head"]
    layers = re.findall("^@@ .* @@ (.*?):", fxprop.code_diff(gm), re.MULTILINE)
    assert layers == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert "sparse products: w: 3/6 channel" in repr(gm)


def test_nothing_to_rewrite_comes_back_unchanged():
    model, gm, report = made(policy=1.0)
    assert type(gm) is Model
    assert not any(is_rewritten(module) for module in gm.modules())
    assert fxprop.code_diff(gm) == ""
    assert fxprop.code_diff(gm) == ""
    assert "0 layers rewritten" in str(report)
    assert gm(**KWARGS).loss.equal(model(**KWARGS).loss)


def test_modes_switch_parts():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return F.dropout(self.fc(x), 0.5, self.training)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Drops(), nn.Linear(8, 2)

        def forward(self, x):
            return x if x.sum().isnan() else self.head(self.inner(x))

    model, x = Outer(), torch.randn(3, 8)
    gm, _ = fxprop.transform(model, 0.5, (x,))
    for training in (False, True, False):
        outputs = []
        for module in (model.train(training), gm.train(training)):
            torch.manual_seed(0)
            outputs.append(module(x))
        assert torch.equal(*outputs)


class Stores(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        self.last = self.fc(x)
        return self.last


class NoGrad(nn.Module):
    """Its second layer is only to be run, not trained."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            target = self.b(x)
        return self.a(x) - target


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        class Special(OrderedDict):
            pass

        return Special(y=self.fc(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Stores(), "stores a tensor in its attribute 'last'"),
        (NoGrad(), "no_grad"),
        (Named(), "a Special, which an fx graph would turn into a plain dict"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_a_graph_would_lose_is_not_traced(model, reason):
    x = torch.randn(2, 4)
    with pytest.raises(TraceError, match=reason):
        fxprop.transform(model, 0.5, (x,), frontend="symbolic")
    policy = fxprop.Policy(rules=[fxprop.Rule(name="*", keep=0.5)])
    gm, report = fxprop.transform(model, policy, (x,))
    assert report.frontend == "submodules"
    ours, theirs = gm(x), model(x)
    assert type(ours) is type(theirs) or isinstance(ours, OrderedDict)
    if isinstance(model, NoGrad):
        gm(x).sum().backward()
        assert model.b.weight.grad is None
        assert [layer.dense.total for layer in report.layers] == [0, 2 * 2 * 4 * 4]
    if isinstance(model, Stores):
        assert gm.last is ours


def test_submodules_without_inputs_is_refused():
    with pytest.raises(TraceError, match="needs example_inputs"):
        fxprop.transform(Block(4), 0.5, frontend="submodules")
    with pytest.raises(TraceError, match="With example_inputs fxprop can also trace the parts"):
        fxprop.transform(Model(), 0.5)


class Standardised(nn.Linear):
    """Its weight is computed from two parameters, in code that reads a value."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.gain = nn.Parameter(torch.ones(n_out, 1))

    def forward(self, x):
        weight = self.gain * (self.weight - self.weight.mean(1, keepdim=True))
        return x if x.isnan().any() else F.linear(x, weight, self.bias)


def test_a_weight_computed_from_several_parameters():
    torch.manual_seed(0)
    model, x = nn.Sequential(Standardised(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
    gm, report = fxprop.transform(model, 0.25, (x,))
    assert [(layer.name, layer.k) for layer in report.layers] == [("0", 2), ("2", None)]
    gm(x).square().sum().backward()
    assert (model[0].gain.grad != 0).sum() <= 2
    assert gradients_equal(model, 0.25, (x,), {}) == "equal"


def test_other_flops_are_what_torch_counts_beyond_the_layers():
    from torch.utils.flop_counter import FlopCounterMode

    model, _, report = made()
    loss = model(**KWARGS).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == report.totals.dense + report.totals.other
