"""Activation memory, checkpointing, accumulation, hooks, saved-tensor hooks."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from compare import equal, gradients_by_name
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

import fxprop

X = torch.randn(6, 3, 10, 10, dtype=torch.double, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


class Net(nn.Module):
    """With `reentrant` given, its blocks are recomputed in the backward."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            recomputed = functools.partial(checkpoint, block, use_reentrant=self.reentrant)
            x = block(x) if self.reentrant is None else recomputed(x)
        return self.head(F.relu(self.fc(x.mean((2, 3)))))


def made(keep=0.25, reentrant=None, **kwargs):
    return fxprop.transform(Net(reentrant).double(), keep, (X,), **kwargs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_transformed_module(reentrant):
    gm, _ = made()
    run = functools.partial(checkpoint, gm, use_reentrant=reentrant)
    x = X.clone().requires_grad_()
    assert equal(gradients_by_name(gm, x, run), gradients_by_name(gm, X))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_the_model(reentrant):
    plain, plain_report = made()
    gm, report = made(reentrant=reentrant)
    assert report.frontend == "submodules"
    assert [(layer.name, layer.k) for layer in report.layers] == [
        (layer.name, layer.k) for layer in plain_report.layers
    ]
    assert equal(gradients_by_name(gm, X), gradients_by_name(plain, X))
    loss = Net(reentrant).double()(X).sum()
    with FlopCounterMode(display=False) as counted:
        loss.backward()
    assert report.totals.dense + report.totals.other == counted.get_total_flops()
    x = X.clone().requires_grad_()
    assert saved_bytes(gm, x) < saved_bytes(plain, x)  # what is recomputed is not saved


def test_checkpoint_wrapper_on_preserved_blocks():
    plain, _ = made()
    gm, _ = made(preserve_modules=[Block])
    expected = gradients_by_name(plain, X)
    apply_activation_checkpointing(
        gm, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: isinstance(module, Block)
    )
    saved = {}
    for name, module in (("recomputed", gm), ("kept", plain)):
        saved[name] = saved_bytes(module, X)
    assert saved["recomputed"] < saved["kept"]
    found = gradients_by_name(gm, X)
    assert equal({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in found.items()}, expected)


def test_checkpoint_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))
    x = torch.randn(5, 8)
    gm, _ = fxprop.transform(model, 0.25, (x,), preserve_modules=["?"])
    run = functools.partial(checkpoint_sequential, gm, 2, use_reentrant=False)
    assert equal(gradients_by_name(gm, x, run), gradients_by_name(gm, x))


def saved_bytes(module, x):
    """Bytes of the distinct storages that autograd keeps for the backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)
    del output
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("select", ["channel", "element"])
def test_activation_memory_is_not_above_the_dense_models(select):
    policy = fxprop.Policy(keep=0.25, select=select)
    gm, _ = made(policy)
    assert saved_bytes(gm, X) <= saved_bytes(Net().double(), X)


def test_activation_memory_of_attention_is_not_above_the_dense_models():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    x = torch.randn(3, 7, 32)
    gm, _ = fxprop.transform(model, 0.25, (x,))
    assert saved_bytes(gm, x) <= saved_bytes(model, x)


def test_accumulation_and_zero_grad():
    gm, _ = made()
    once = gradients_by_name(gm, X)
    gm(X).square().sum().backward()
    for name, parameter in gm.named_parameters():
        assert torch.allclose(parameter.grad, 2 * once[name])
    gm.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in gm.parameters())
    gm(X).square().sum().backward()
    assert equal({name: p.grad for name, p in gm.named_parameters()}, once)
    gm.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in gm.parameters())


def test_retained_graph_gives_the_same_again():
    gm, _ = made()
    loss = gm(X).square().sum()
    first = torch.autograd.grad(loss, list(gm.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(gm.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_tensor_hooks_see_the_gradients():
    gm, _ = made()
    seen = []
    gm.stem.weight.register_hook(lambda grad: seen.append("weight"))
    gm.stem.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    x = X.clone().requires_grad_()
    x.register_hook(lambda grad: seen.append("input"))
    gm(x).sum().backward()
    assert sorted(seen) == ["accumulated", "input", "weight"]


def watch(module, seen):
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module.register_forward_hook(lambda m, args, output: seen.append("forward"))
    module.register_full_backward_pre_hook(lambda m, grad_output: seen.append("backward pre"))
    module.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append("backward"))


EVENTS = ["pre", "forward", "backward pre", "backward"]


def test_hooks_put_on_before_the_transform_run():
    model, seen = Net().double(), []
    for module in (model.blocks[0], model.blocks[1], model.fc):
        watch(module, seen)
    gm, report = fxprop.transform(model, 0.25, (X,))
    assert next(layer for layer in report.layers if layer.name == "fc").status == "rewritten"
    seen.clear()
    gm(X).sum().backward()
    assert sorted(seen) == sorted(3 * EVENTS)


def test_hooks_put_on_preserved_modules_run():
    gm, report = made(preserve_modules=["blocks.*", "fc"])
    assert [(layer.name, layer.k) for layer in report.layers] == [
        (layer.name, layer.k) for layer in made()[1].layers
    ]
    seen = []
    for module in (gm, gm.blocks[0], gm.fc):
        watch(module, seen)
    gm(X.clone().requires_grad_()).sum().backward()
    assert sorted(seen) == sorted(3 * EVENTS)


def test_hooks_that_cannot_run_are_told_once():
    gm, _ = made()
    gm(X)
    gm.blocks[1].register_forward_hook(lambda *_: None)
    gm.fc.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hooks on blocks\.1, fc do not run.*preserve_modules=\[\.\.\.\]"):
        gm(X)
    gm(X)  # an error if it warned again: warnings are errors here
    twin = copy.deepcopy(gm)
    with pytest.warns(UserWarning, match="do not run"):
        twin(X)


def test_what_cannot_be_preserved_is_an_error_that_names_the_near_misses():
    with pytest.raises(
        fxprop.FxpropError, match=r"'block\.0' matches no module of Net\. Nearest: blocks\.0"
    ):
        made(preserve_modules=["block.0"])
    with pytest.raises(fxprop.FxpropError, match="LSTM.* matches no module of Net"):
        made(preserve_modules=[nn.LSTM])
    with pytest.raises(fxprop.FxpropError, match="cannot preserve modules; use"):
        made(frontend="export", preserve_modules=["fc"])


def test_tensors_saved_elsewhere():
    gm, _ = made()
    expected = gradients_by_name(gm, X)
    with torch.autograd.graph.save_on_cpu():
        assert equal(gradients_by_name(gm, X), expected)

    def pack(tensor):
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert equal(gradients_by_name(gm, X), expected)


def test_in_place_change_of_a_saved_weight_is_noticed():
    gm, _ = made()
    loss = gm(X).sum()
    with torch.no_grad():
        gm.fc.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("policy", ["exact", "fast"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n)])
def test_regions_and_chains_under_a_checkpoint(policy, norm):
    """Each saved tensor may be read once there, also where one layer chooses for the next."""
    block = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 36, 8), nn.ReLU(), nn.Linear(8, 4)),
    )
    x = torch.randn(8, 4, 6, 6, requires_grad=True)
    make = fxprop.Policy.fast if policy == "fast" else fxprop.Policy
    # the score that reads all forms no region of group norm that small by itself
    gm, report = fxprop.transform(block, make(keep=0.25, when="always"), (x,))
    assert any(layer.region for layer in report.layers)

    def gradients(call):
        block.zero_grad()
        call(x).square().sum().backward()
        return [p.grad.clone() for p in (x, *block.parameters()) if p.grad is not None]

    straight = gradients(gm)
    x.grad = None
    again = gradients(lambda x: checkpoint(gm, x, use_reentrant=False))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(straight, again, strict=True))
