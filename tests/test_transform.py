"""transform, estimate, layers, restore as a user calls them: what stays, what is refused."""

import collections
import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

import fxprop
from fxprop.errors import InputError, ModelError, PolicyError, TraceError


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )


X = torch.randn(2, 3, 6, 6)


def snapshot(model):
    """Everything a failed or finished call must leave alone."""
    return (
        model.training,
        {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        {name: module.training for name, module in model.named_modules()},
        [parameter.grad for parameter in model.parameters()],
        torch.get_rng_state(),
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[2:5] == before[2:5]
    assert torch.equal(after[5], before[5])
    assert after[1].keys() == before[1].keys()
    for key, (identity, value) in before[1].items():
        assert after[1][key][0] == identity, key
        assert torch.equal(after[1][key][1], value), key


def test_same_parameters_and_keys():
    model = small()
    before = snapshot(model)
    gm, report = fxprop.transform(model, 0.2, (X,))
    assert_unchanged(model, before)
    assert isinstance(gm, fx.GraphModule)
    assert type(gm).__name__ == "Sequential"
    assert list(gm.state_dict()) == list(model.state_dict())
    for (name, ours), (_, theirs) in zip(gm.named_parameters(), model.named_parameters(), strict=True):
        assert ours is theirs, name
    assert fxprop.Transformed(gm, report) == (gm, report)
    assert "fxprop_ops_conv2d(input_1, _0_weight, _0_bias, stride = (1, 1)" in gm.code


def test_the_model_survives_what_happens_to_the_result():
    model = small()
    gm, _ = fxprop.transform(model, 0.2, (X,))
    gm.eval()
    assert model.training
    assert model[1].training
    assert not getattr(gm, "1").training


def test_optimizer_made_before_still_fits():
    torch.manual_seed(0)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gm, _ = fxprop.transform(model, 0.2, (X,))
    before = model[0].weight.detach().clone()
    gm(X).sum().backward()
    optimizer.step()
    changed = (gm.get_parameter("0.weight") != before).flatten(1).any(1)
    assert changed.sum() == 2  # 0.2 of 8 channels


def test_unused_layers_keep_their_keys():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)
            self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(2), persistent=False)

        def forward(self, x):
            return self.b(self.a(x))

    model = Model()
    gm, report = fxprop.transform(model, 0.5, (torch.randn(2, 4),))
    assert list(gm.state_dict()) == list(model.state_dict())
    assert "scale" in dict(gm.named_buffers())
    assert [layer.name for layer in report.layers] == ["a", "b"]


def test_nothing_to_rewrite_is_said():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4))
    gm, report = fxprop.transform(model, 0.1, (torch.randn(2, 4),))
    assert report.layers == ()
    assert report.totals.saving == 0.0
    assert "No layer was found" in str(report)
    assert gm.code == fxprop.restore(gm).code


def test_restore_gives_back_the_code_and_the_present_parameters():
    model = small()
    plain = fxprop.transform(model, 1.0, (X,)).module
    gm, _ = fxprop.transform(model, 0.2, (X,))
    dense = fxprop.restore(gm)
    assert dense.code == plain.code
    assert dense.get_parameter("0.weight") is model[0].weight
    assert torch.equal(dense(X), model(X))
    again, _ = fxprop.transform(dense, 0.2, (X,))
    assert again.code == gm.code
    with pytest.raises(ModelError, match="expected the module that fxprop.transform returned"):
        fxprop.restore(dense)
    with pytest.raises(ModelError, match="expected the module that fxprop.transform returned"):
        fxprop.restore(model)


def test_nodes_keep_their_metadata_and_get_one_key():
    model = torchvision.models.resnet18()
    dense = fxprop.transform(model, 1.0, (torch.empty(2, 3, 64, 64),)).module
    gm, _ = fxprop.transform(model, 0.1, (torch.empty(2, 3, 64, 64),))
    new = {node.name: node for node in gm.graph.nodes}
    sites = 0
    for node in dense.graph.nodes:
        twin = new[node.name]
        assert set(node.meta) <= set(twin.meta)
        for key in ("stack_trace", "nn_module_stack", "tensor_meta"):
            assert (key in node.meta) == (key in twin.meta)
        assert {user.name for user in node.users} == {user.name for user in twin.users}
        extra = set(twin.meta) - set(node.meta)
        if extra:
            assert extra == {"fxprop"}
            assert twin.meta["fxprop"].site.node == node.name
            sites += 1
    assert sites == 20
    assert "resnet.py" in new["layer1_0_conv1"].meta["stack_trace"]
    assert new["layer1_0_conv1"].meta["tensor_meta"].shape == (2, 64, 16, 16)


# --- modes ----------------------------------------------------------------------------------------------


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

    model = Model().eval()
    gm, _ = fxprop.transform(model, 0.5, (torch.randn(2, 4),))
    with pytest.raises(TraceError, match=r"transformed in eval mode.*test_transform.py.*x.sum\(\) > 0"):
        gm.train()
    with pytest.raises(TraceError, match="x.sum"):
        fxprop.transform(model.train(), 0.5, (torch.randn(2, 4),))


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


# --- copies ---------------------------------------------------------------------------------------------


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


# --- inputs ---------------------------------------------------------------------------------------------


def test_fake_meta_and_real_inputs_give_one_report():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = small()
    fake = FakeTensorMode().from_tensor(X)
    reports = [fxprop.estimate(model, 0.2, x).to_dict() for x in ((X,), (X.to("meta"),), (fake,), X)]
    assert all(report == reports[0] for report in reports)
    assert fxprop.estimate(model.to("meta"), 0.2, (X,)).to_dict() == reports[0]


def test_without_inputs_the_graph_is_the_same_and_flops_are_unknown():
    model = small()
    gm, report = fxprop.transform(model, 0.2)
    assert gm.code == fxprop.transform(model, 0.2, (X,)).module.code
    assert report.totals.dense is None
    assert report.to_dict()["layers"][0]["dense"] is None
    assert "FLOPs were not counted" in str(report)
    assert report.to_csv()
    with pytest.raises(PolicyError, match="layer '0'.*known only with example_inputs; pass example_inputs"):
        fxprop.transform(model, fxprop.Policy(keep=0.2, select="element"))


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
        ((object(),), None, "contain a object: expected tensors"),
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


# --- models that are refused ----------------------------------------------------------------------------


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


def test_complex_layers_are_refused_unless_left_dense():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4, dtype=torch.complex64))
    x = torch.randn(2, 4, dtype=torch.complex64)
    with pytest.raises(PolicyError, match=r"layer '0' has complex tensors.*keep=1.0"):
        fxprop.transform(model, 0.5, (x,))
    dense = fxprop.Policy(keep=0.5, rules=[fxprop.Rule(type="Linear", keep=1.0)])
    gm, _ = fxprop.transform(model, dense, (x,))
    assert torch.equal(gm(x), model(x))


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
        fxprop.transform(model, 0.5, (torch.empty(2, 4),))
    message = str(caught.value)
    assert "module 'blocks.0' (Inner)" in message
    assert "test_transform.py" in message
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


def test_a_graph_module_is_used_as_it_is():
    model = small()
    graph_module = fx.symbolic_trace(model)
    for node in graph_module.graph.nodes:
        if node.target == "2":
            node.target = "1"  # an edit that tracing again would lose
    graph_module.recompile()
    owner = graph_module.graph.owning_module
    gm, report = fxprop.transform(graph_module, 0.2, (X,))
    assert report.layers[0].status == "rewritten"
    assert torch.equal(gm.eval()(X), graph_module.eval()(X))
    assert 'getattr(self, "2")' not in gm.code
    assert graph_module.graph.owning_module is owner


def test_references_inside_the_model_point_into_the_copy():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
            self.stages = [self.fc, self.helper]

        def helper(self, x):
            return self.out(x)

        def forward(self, x):
            for stage in self.stages:
                x = stage(x)
            return x

    model, x = Model(), torch.randn(2, 4)
    gm, report = fxprop.transform(model, 0.5, (x,))
    assert [layer.name for layer in report.layers] == ["fc", "out"]
    assert torch.equal(gm(x), model(x))


def test_batch_norm_without_momentum():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 4, 3))
    gm, report = fxprop.transform(model, 0.5, (X,))
    assert report.totals.dense > 0
    twin = copy.deepcopy(model)
    assert torch.equal(gm(X), twin(X))
    assert getattr(gm, "1").momentum is None


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_keeps_the_model_alive(fails):
    model = small()
    weight = weakref.ref(model[0].weight)
    if fails:
        with pytest.raises(InputError, match="fails at layer '4'"):
            fxprop.transform(model, 0.2, (torch.empty(2, 3, 9, 9),))
    else:
        gm, _ = fxprop.transform(model, 0.2, (X,))
        gm(X).sum().backward()
        del gm
    del model
    gc.collect()
    assert weight() is None
