"""What people do with a module besides calling it: functional calls, averages, parametrizations, workers."""

import copy
import io
import multiprocessing
import threading

import pytest
import torch
import torch.nn.functional as F
from compare import equal, gradients
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import fxprop
from fxprop.errors import OpError

X = torch.randn(6, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    version = 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(16 * 36, 24)
        self.fc2 = nn.Linear(24, 24)
        self.head = nn.Linear(24, 4)
        self.train()

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))

    def train(self, mode=True):
        """Keeps the normalisation frozen, as fine-tuning code does."""
        super().train(mode)
        self.norm.eval()
        return self

    def predict(self, x):
        return self(x).argmax(1)


def made(keep=0.25, model=None, **kwargs):
    model = Net().double() if model is None else model
    return model, fxprop.transform(model, keep, (X,), **kwargs)[0]


def test_the_class_its_methods_and_its_own_train_stay():
    model, gm = made()
    assert isinstance(gm, Net)
    assert isinstance(gm, torch.fx.GraphModule)
    assert gm.version == 3
    assert torch.equal(gm.predict(X), model.predict(X))
    gm.eval()
    gm.train()
    assert gm.training
    assert not gm.norm.training


def test_sequential_is_still_indexed():
    gm, _ = fxprop.transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)), 0.5)
    assert gm[0].weight is gm.get_parameter("0.weight")
    assert len(gm) == 3


def test_state_dict_files(tmp_path):
    model, gm = made()
    torch.save(gm.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == list(model.state_dict())
    Net().double().load_state_dict(state, strict=True)
    gm.load_state_dict(Net().double().state_dict(), strict=True)


def test_the_module_itself_in_a_file(tmp_path):
    _, gm = made()
    torch.save(gm, tmp_path / "module.pt")
    twin = torch.load(tmp_path / "module.pt", weights_only=False)
    assert isinstance(twin, Net)
    assert equal(gradients(twin, X), gradients(gm, X))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_export(mode):
    _, gm = made()
    getattr(gm, mode)()
    program = torch.export.export(gm, (X,))
    assert torch.equal(program.module()(X), gm(X))


def test_functional_call_and_grad():
    _, gm = made()
    parameters = {name: p.detach() for name, p in gm.named_parameters()}

    def loss(parameters, x):
        return functional_call(gm, parameters, (x,)).square().sum()

    found = grad(loss)(parameters, X)
    assert equal([found[name] for name in parameters], gradients(gm, X))
    doubled = {name: 2 * p for name, p in parameters.items()}
    assert not torch.equal(functional_call(gm, doubled, (X,)), gm(X))


def test_vmap_is_refused_where_it_would_take_the_batch_apart():
    _, gm = made()
    parameters = {name: p.detach() for name, p in gm.named_parameters()}

    def loss(parameters, x):
        return functional_call(gm, parameters, (x[None],)).square().sum()

    with pytest.raises(OpError, match=r"vmap over a sparse backward is not defined.*fxprop\.restore"):
        vmap(grad(loss), (None, 0))(parameters, X)
    with pytest.raises(OpError, match="vmap over a sparse backward is not defined"):
        jacrev(gm)(X)
    dense = fxprop.restore(gm)
    assert vmap(lambda x: functional_call(dense, parameters, (x[None],)))(X).shape == (6, 1, 4)
    with torch.no_grad():
        assert torch.allclose(vmap(lambda x: gm(x[None]))(X)[:, 0], gm(X))


def test_double_backward_is_refused_whichever_way_it_is_asked_for():
    _, gm = made()
    x = X.clone().requires_grad_()
    (once,) = torch.autograd.grad(gm(x).square().sum(), x, create_graph=True)
    with pytest.raises(OpError, match="double backward through a sparse backward is not defined"):
        torch.autograd.grad(once.sum(), x, allow_unused=True)
    with pytest.raises(OpError, match="double backward"):
        once.sum().backward()
    with pytest.raises(OpError, match="double backward"):
        grad(lambda x: grad(lambda x: gm(x).square().sum())(x).sum())(X)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models(use_buffers):
    model, gm = made()
    average = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    dense = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        gm(X).square().mean().backward()
        optimizer.step()
        average.update_parameters(gm)
        dense.update_parameters(model)  # shares its parameters with gm
    assert list(average.state_dict()) == list(dense.state_dict())
    assert equal(average.state_dict().values(), dense.state_dict().values())
    assert torch.equal(average(X), dense(X))


def test_optimizers_made_before_and_after():
    model = Net().double()
    before = torch.optim.Adam(model.parameters(), lr=0.01)
    model(X).square().mean().backward()
    before.step()
    gm = made(model=model)[1]
    twin = copy.deepcopy(gm)
    after = torch.optim.Adam(twin.parameters(), lr=0.01)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for module, optimizer in ((gm, before), (twin, after)):
        module.zero_grad()
        module(X).square().mean().backward()
        optimizer.step()
    assert equal(gm.parameters(), twin.parameters())


PARAMETRIZE = {
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Tanh()),
}


class Tanh(nn.Module):
    def forward(self, weight):
        return weight.tanh()


@pytest.mark.parametrize("how", PARAMETRIZE)
def test_parametrized_before_and_after(how):
    """In eval mode: spectral norm's power iteration goes on with every training forward."""
    before = Net().double()
    PARAMETRIZE[how](before.fc1)
    before.eval()
    _, gm = made(model=before)
    _, after = made()
    after.eval()
    torch.manual_seed(0)
    PARAMETRIZE[how](after.fc1)
    after.load_state_dict(before.state_dict())
    assert torch.equal(gm(X), before(X))
    assert torch.equal(after(X), before(X))
    assert equal(gradients(gm, X), gradients(after, X))
    assert not equal(gradients(gm, X), gradients(before, X))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_computed_by_hooks(how):
    """The older forms put a hook on the layer, which stays a module and is rewritten all the same."""
    model = Net().double()
    how(model.fc1)
    model.eval()
    gm, report = fxprop.transform(model, 0.25, (X,))
    assert [layer.name for layer in report.layers if layer.status == "rewritten"] == ["conv", "fc1", "fc2"]
    for _ in range(2):
        assert torch.equal(gm(X), model(X))
        with torch.no_grad():
            own = gm.fc1.weight_g if how is nn.utils.weight_norm else gm.fc1.weight_orig
            own.mul_(1.5)  # the hook sees it
    assert not equal(gradients(gm, X), gradients(model, X))
    later = made()[1]
    how(later.fc1)
    with pytest.warns(UserWarning, match="hooks on fc1 do not run"):
        later(X)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(20, 8)
            self.mix = nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.mix(self.embedding(ids)).relu())

    ids = torch.arange(12).view(3, 4)
    gm, _ = fxprop.transform(
        Tied(), fxprop.Policy(keep=0.25, rules=[fxprop.Rule(name="head", keep=0.25)]), (ids,)
    )
    assert gm.head.weight is gm.embedding.weight
    gm(ids).sum().backward()
    torch.optim.SGD(gm.parameters(), lr=0.1).step()
    assert gm.head.weight is gm.embedding.weight
    assert copy.deepcopy(gm).head.weight is not gm.head.weight


@pytest.mark.parametrize("when", ["before", "after"])
def test_partly_frozen(when):
    model = Net().double()
    frozen = [model.conv.weight, model.fc1.weight, model.fc1.bias]
    if when == "before":
        [p.requires_grad_(False) for p in frozen]
    _, gm = made(model=model)
    if when == "after":
        [p.requires_grad_(False) for p in frozen]
    gm(X).square().sum().backward()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in gm.parameters() if p.requires_grad)
    for p in frozen:
        p.requires_grad_(True)
    gm(X).square().sum().backward()
    assert all(p.grad is not None for p in gm.parameters())


def test_dtype_and_modes_of_inference():
    _, gm = made()
    expected = gm(X)
    with torch.inference_mode():
        assert torch.equal(gm(X), expected)
        assert gm(X).is_inference()
    with torch.no_grad():
        assert not gm(X).requires_grad
    gm.float()
    assert gm(X.float()).dtype == torch.float32
    gm(X.float()).sum().backward()
    assert gm.conv.weight.grad.dtype == torch.float32
    assert gm.to("meta")(X.float().to("meta")).is_meta


def test_backward_in_several_threads():
    _, gm = made()
    expected = gradients(gm, X)
    found, errors = [None] * 4, []

    def work(number):
        try:
            found[number] = gradients(gm, X)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert errors == []
    assert all(equal(expected, grads) for grads in found)


class Features(Dataset):
    """Examples made by a transformed module, in the loader's workers."""

    def __init__(self, gm, backward):
        self.gm, self.backward = gm, backward

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = X[index : index + 2].clone().requires_grad_()
        loss = self.gm(x).square().sum()
        if not self.backward:
            return loss.detach()
        loss.backward()
        return x.grad.abs().sum()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method):
    _, gm = made()
    # torch refuses a backward in a forked process once autograd has run in its parent
    data = Features(gm, backward=method == "spawn")
    loader = DataLoader(data, num_workers=2, multiprocessing_context=multiprocessing.get_context(method))
    found = [value.item() for value in loader]
    assert found == pytest.approx([data[index].item() for index in range(4)])


def test_a_pickle_holds_no_function_of_the_policy():
    policy = fxprop.Policy(keep=0.25, rules=[fxprop.Rule(where=lambda site: site.name == "fc1", keep=0.5)])
    _, gm = made(policy)
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert {layer.name: layer.k for layer in fxprop.set_keep(twin, 0.75).layers} == {
        layer.name: layer.k for layer in fxprop.set_keep(gm, 0.75).layers
    }
