"""Train and eval graphs, deep copies, pickles, output types."""

import collections
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import IMAGES as X
from models import small
from torch import nn

import fxprop
from fxprop.errors import TraceError


class ReadsTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = F.dropout(self.a(x), 0.5, training=self.training)
        if self.training:
            return self.b(x), self.aux(x)
        return self.b(x)


@pytest.mark.parametrize("start", [True, False])
def test_functional_dropout_and_branches_follow_train_and_eval(start):
    model, x = ReadsTraining().train(start), torch.randn(3, 4)
    gm, report = fxprop.transform(model, 0.5, (x,))
    assert report.mode == ("train" if start else "eval")
    for mode in (True, False, True):
        model.train(mode)
        gm.train(mode)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(gm(x), expected, atol=0, rtol=0)
        assert ("aux" in gm.code) == mode
        assert "fxprop_ops_linear" in gm.code


def test_a_mode_that_cannot_be_traced_is_refused_when_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            if self.training and x.sum() > 0:
                return x
            return self.fc(x)

    model, x = Model().eval(), torch.randn(2, 4)
    parts, _ = fxprop.transform(model, 0.5, (x,))  # in parts, it goes into either
    for mode in (True, False):
        assert torch.equal(parts.train(mode)(x), model.train(mode)(x))
    gm, _ = fxprop.transform(model, 0.5, (x,), frontend="symbolic")
    with pytest.raises(
        TraceError, match=r"transformed in eval mode.*test_modes_and_copies.py.*x.sum\(\) > 0"
    ):
        gm.train()
    with pytest.raises(TraceError, match="x.sum"):
        fxprop.transform(model.train(), 0.5, (torch.randn(2, 4),), frontend="symbolic")


class OwnNorm(nn.Module):
    """A third-party norm: its buffer must be updated in training, at run time."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(n))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return x * self.scale


def test_third_party_norm_stays_a_module():
    model = nn.Sequential(nn.Linear(4, 4), OwnNorm(4), nn.Linear(4, 2))
    gm, _ = fxprop.transform(model, 0.5, (torch.randn(2, 4),))
    assert 'getattr(self, "1")(' in gm.code
    gm(torch.randn(2, 4))
    gm.eval()
    gm(torch.randn(2, 4))
    assert model[1].seen == 1
    assert list(gm.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [small, ReadsTraining])
def test_copies_and_pickles(make, copier):
    model = make()
    x = X if make is small else torch.randn(2, 4)
    gm, _ = fxprop.transform(model, 0.3, (x,))
    twin = copier(gm)
    assert list(twin.state_dict()) == list(gm.state_dict())
    assert next(twin.parameters()) is not next(gm.parameters())
    for mode in (False, True):
        gm.train(mode)
        twin.train(mode)
        calls = [[n.target for n in m.graph.nodes if n.op.startswith("call")] for m in (gm, twin)]
        assert calls[0] == calls[1]  # tracing the pickled code again gives some nodes other names
    assert fxprop.restore(twin).code == fxprop.restore(gm).code
    twin.eval()
    gm.eval()
    assert torch.equal(twin(x), gm(x))


def test_outputs_keep_their_types():
    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.fc, self.kind = nn.Linear(4, 4), kind

        def forward(self, x):
            y = self.fc(x)
            if self.kind == "ordered":
                return collections.OrderedDict(out=y, aux=x)
            return {"out": y} if self.kind == "dict" else [y, (x,)]

    for kind in ("ordered", "dict", "list"):
        model = Model(kind)
        gm, _ = fxprop.transform(model, 0.5, (torch.randn(2, 4),))
        ours, theirs = gm(torch.ones(2, 4)), model(torch.ones(2, 4))
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
