"""Example inputs in all their forms, and everything that is refused with a clear error."""

import pickle
import warnings

import pytest
import torch
from compare import assert_unchanged, snapshot
from models import IMAGES as X
from models import small
from torch import nn

import fxprop
from fxprop.errors import InputError, ModelError, PolicyError, TraceError


def test_fake_meta_and_real_inputs_give_one_report():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = small()
    fake = FakeTensorMode().from_tensor(X)
    reports = [fxprop.estimate(model, 0.2, x).to_dict() for x in ((X,), (X.to("meta"),), (fake,), X)]
    assert all(report == reports[0] for report in reports)
    assert fxprop.estimate(model.to("meta"), 0.2, (X,)).to_dict() == reports[0]


def test_without_inputs_the_graph_is_the_same_and_flops_are_unknown():
    model = small()
    policy = fxprop.Policy(keep=0.2, when="always")  # nothing is predicted without shapes
    gm, report = fxprop.transform(model, policy)
    assert gm.code == fxprop.transform(model, policy, (X,)).module.code
    assert report.totals.dense is None
    assert report.to_dict()["layers"][0]["dense"] is None
    assert "FLOPs were not counted" in str(report)
    assert report.to_csv()
    with pytest.raises(PolicyError, match="layer '0'.*known only with example_inputs; pass example_inputs"):
        fxprop.transform(model, fxprop.Policy(keep=0.2, select="element"))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_any_grad_mode_gives_the_same_report(context):
    model = small()
    expected = fxprop.estimate(model, 0.2, (X,)).to_dict()
    with context():
        report = fxprop.transform(model, 0.2, (X.clone(),)).report
    assert report.to_dict() == expected


def test_a_backward_that_fails_is_said():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x).sigmoid()  # whose backward needs its output
            return y * y.add_(1)

    with pytest.raises(
        InputError, match="own backward fails.*modified by an inplace operation.*Leave example_inputs"
    ):
        fxprop.transform(Model(), 0.5, (torch.randn(2, 4),))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, mask=None, scale: float = 1.0, *, flip=False):
        x = self.fc(x) * scale
        if mask is not None:
            x = x * mask
        return -x if flip else x


def test_optional_arguments_are_fixed_and_checked():
    model, x, mask = Optional(), torch.randn(2, 4), torch.rand(2, 4)
    without = fxprop.transform(model, 0.5, (x,)).module
    assert torch.equal(without(x), model(x))
    with pytest.raises(InputError, match=r"argument 'mask' is float32\[2, 4\], but.*made for mask=None"):
        without(x, mask)
    with pytest.raises(InputError, match="made for flip=False"):
        without(x, flip=True)
    given = fxprop.transform(model, 0.5, (x, mask), example_kwargs={"flip": True, "scale": 2.0}).module
    assert torch.equal(given(x, mask, 2.0, flip=True), model(x, mask, 2.0, flip=True))
    restored = pickle.loads(pickle.dumps(given))
    assert torch.equal(restored(x, mask, 2.0, flip=True), model(x, mask, 2.0, flip=True))


@pytest.mark.parametrize(
    ("inputs", "kwargs", "match"),
    [
        ([X], None, r"example_inputs is a list: expected a tuple"),
        ((X, X), None, "do not fit Sequential.forward"),
        ((torch.randn(2, 5, 6, 6),), None, r"float32\[2, 5, 6, 6\].*fails at layer '0'"),
        ((torch.randn(2, 3, 9, 9),), None, "fails at layer '4'"),
        ((X.double(),), None, "fails at layer '0'"),
        ((X.long(),), None, "fails at layer '0'"),
        ((object(),), None, "cannot run on the example inputs .*fails at layer '0'"),
        (None, {"nothing": X}, "do not fit"),
        (None, [X], "example_kwargs is a list: expected a dict"),
        ((), None, "do not fit Sequential.forward"),
    ],
)
def test_bad_inputs(inputs, kwargs, match):
    model = small()
    before = snapshot(model)
    with pytest.raises(InputError, match=match):
        fxprop.transform(model, 0.2, inputs, example_kwargs=kwargs)
    assert_unchanged(model, before)


def mixed():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))


def rewritten():
    return fxprop.transform(small(), 0.2, (X,)).module


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: "resnet18", "model is a str: expected a torch.nn.Module"),
        (mixed, r"several devices \(cpu, meta\): move it to one"),
        (rewritten, "Sequential was already transformed by fxprop: call fxprop.restore"),
        (lambda: nn.Sequential(rewritten()), "already transformed by fxprop"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "lazy parameters.*run the model once"),
        (lambda: torch.compile(small()), "comes from torch.compile: transform the module first"),
        (lambda: nn.DataParallel(small()), "DataParallel wraps a model"),
    ],
)
def test_models_that_are_refused(make, match):
    with pytest.raises(ModelError, match=match):
        fxprop.transform(make(), 0.2, (X,))


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(small(), X)
    with pytest.raises(ModelError, match="TorchScript module"):
        fxprop.transform(scripted, 0.2, (X,))


def test_unknown_frontend():
    with pytest.raises(TraceError, match="unknown front-end 'magic': expected"):
        fxprop.transform(small(), 0.2, (X,), frontend="magic")


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:  # the line to name
            return self.fc(x)
        return x


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Inner()])

    def forward(self, x):
        return self.blocks[0](self.first(x))


def test_trace_error_names_module_line_and_remedy():
    model = Outer()
    before = snapshot(model)
    with pytest.raises(TraceError) as caught:
        fxprop.transform(model, 0.5, (torch.empty(2, 4),), frontend="symbolic")
    message = str(caught.value)
    assert "module 'blocks.0' (Inner)" in message
    assert "test_inputs_and_refusals.py" in message
    assert "`if x.sum() > 0:  # the line to name`" in message
    assert "leaf_modules=[...]" in message
    assert_unchanged(model, before)


@pytest.mark.parametrize("leaf", [Inner, "blocks.0"])
def test_leaf_modules_get_past_it(leaf):
    model, x = Outer(), torch.randn(2, 4)
    policy = fxprop.Policy(rules=[fxprop.Rule(name="first", keep=0.5)])

    layers = fxprop.layers(model, leaf_modules=[leaf])
    assert [(site.name, site.skip is None) for site in layers] == [("first", True), ("blocks.0", False)]
    gm, report = fxprop.transform(model, policy, leaf_modules=[leaf])
    assert report.layers[0].status == "rewritten"
    assert torch.equal(gm(x), model(x))
