"""transform, estimate, layers, restore as a user calls them: what stays and what comes back."""

import copy
import cProfile
import gc
import sys
import weakref

import pytest
import torch
import torchvision
from compare import assert_unchanged, snapshot
from models import IMAGES as X
from models import small
from torch import fx, nn

import fxprop
from fxprop.errors import InputError, ModelError


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


class AsksForTheClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return x if type(x) is int else self.layer(x)


def test_under_a_profiler():
    def report(device):
        with torch.device(device):
            return str(fxprop.transform(AsksForTheClass(), 0.25, (torch.rand(4, 8),)).report)

    # with real tensors and without: calls are looked at where the model runs on fake ones
    alone = [report(device) for device in ("cpu", "meta")]
    calls = []
    for before in (lambda frame, event, _: calls.append(event), None):
        sys.setprofile(before)
        assert [report(device) for device in ("cpu", "meta")] == alone
        assert sys.getprofile() is before
    assert calls
    with cProfile.Profile():
        assert [report(device) for device in ("cpu", "meta")] == alone


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_of_cycles_is_as_before(enabled):
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.enable() if enabled else gc.disable()
    try:
        fxprop.transform(AsksForTheClass(), 0.25, (torch.rand(4, 8),))
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == frozen
    finally:
        gc.enable() if before else gc.disable()
