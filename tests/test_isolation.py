"""Nothing of what fxprop runs a model with stays behind, wherever the model's code puts what it computes."""

import collections
import contextlib
import copy
import functools
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from compare import assert_behaves_like, assert_equal, seed, state_and_hooks_of, surroundings
from models import MAY_RUN_AS_WRITTEN, POLICY, Net, X, sparse_rows, transform
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fxprop

pytestmark = MAY_RUN_AS_WRITTEN

CALLS = {
    "transform": lambda model, **kwargs: fxprop.transform(model, POLICY, (X,), **kwargs),
    "estimate": lambda model, **kwargs: fxprop.estimate(model, POLICY, (X,), **kwargs),
    "layers": lambda model, **kwargs: fxprop.layers(model, (X,), **kwargs),
}


def left_behind():
    """Every fake tensor and every proxy that was made in this test and is alive, wherever it is held."""
    gc.collect()
    return [value for value in gc.get_objects() if issubclass(type(value), FakeTensor | fx.Proxy)]


class Box:
    value = None


class Holder:
    def __init__(self):
        self.value = None
        self.values = []


def grid(n):
    return torch.arange(n).float()


lru_cached_grid = functools.lru_cache(maxsize=4)(grid)
GLOBAL, LOCAL = {}, threading.local()


def remembering(value, seen=[]):  # noqa: B006
    seen.append(value)


def counting():
    last = None

    def keep(value):
        nonlocal last
        last = value

    return keep


def cached_in_a_dict(net, h):
    if "grid" not in GLOBAL:
        GLOBAL["grid"] = grid(12)
    return GLOBAL["grid"]


def caught(net, h):
    try:
        raise ValueError("this error has a traceback, whose frames hold tensors", h)
    except ValueError as error:
        net.holder.value = error


# where code puts a tensor `h`; what is returned is added to it
PLACES = {
    "lru_cache": lambda net, h: lru_cached_grid(h.shape[1]),
    "cache of a method": lambda net, h: net.table(12),
    "cache in a global dict": cached_in_a_dict,
    "global dict": lambda net, h: GLOBAL.update(last=h),
    "thread-local": lambda net, h: setattr(LOCAL, "last", h),
    "class attribute": lambda net, h: setattr(Box, "value", h),
    "attribute of the model's class": lambda net, h: setattr(type(net), "last", h),
    "closure": lambda net, h: net.keep(h),
    "default argument": lambda net, h: remembering(h),
    "function attribute": lambda net, h: setattr(grid, "last", h),
    "plain object": lambda net, h: setattr(net.holder, "value", h),
    "list of a plain object": lambda net, h: net.holder.values.append(h),
    "list": lambda net, h: net.history.append(h),
    "deque": lambda net, h: net.recent.append(h),
    "dict": lambda net, h: net.by_name.update(h=h),
    "attribute": lambda net, h: setattr(net, "last", h),
    "module in a list": lambda net, h: setattr(net.others[0], "last", h),
    "error": caught,
}


class Keeps(Net):
    def __init__(self, place, way):
        super().__init__()
        self.place, self.way = place, way
        self.holder, self.keep = Holder(), counting()
        self.history, self.recent, self.by_name, self.others = [], collections.deque(maxlen=2), {}, [Net()]
        self.table = functools.cache(grid)

    def forward(self, x):
        h = torch.relu(self.a(x))
        if (self.way == "shape" and x.shape[0] > 99) or (self.way == "value" and h.sum() > 1e9):
            h = h * 2
        more = PLACES[self.place](self, h)
        if self.way == "fails":
            raise RuntimeError("this model fails")
        return self.o(torch.relu(self.b(h if more is None else h + more)))


@pytest.fixture(autouse=True, scope="module")
def thawed():
    """Afterwards, all objects are collected again."""
    gc.collect()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def emptied():
    """What was there before a test does not count; what the tests put in places of their own goes."""
    gc.freeze()  # takes what there is from gc.get_objects(), and makes looking through the rest quick
    yield
    lru_cached_grid.cache_clear()
    GLOBAL.clear()
    vars(LOCAL).clear()
    remembering.__defaults__[0].clear()
    Box.value = None
    for owner in (Keeps, grid):
        with contextlib.suppress(AttributeError):
            del owner.last


def test_what_is_left_behind_would_be_seen():
    assert left_behind() == []
    with FakeTensorMode():
        Box.value = torch.ones(3)
    assert [type(value) for value in left_behind()] == [FakeTensor]
    Box.value = fx.Tracer()
    Box.value.trace(Net())
    Box.value = fx.Proxy(fx.Graph().placeholder("x"))
    assert [type(value) for value in left_behind()] == [fx.Proxy]
    Box.value = None
    assert left_behind() == []


@pytest.mark.parametrize("way", ["straight", "shape", "value", "fails"])
@pytest.mark.parametrize("place", PLACES)
def test_no_fake_tensor_and_no_proxy_is_left_behind(place, way):
    torch.manual_seed(0)
    model = Keeps(place, way)
    seed(3)
    before, around = state_and_hooks_of(model), surroundings()
    with (
        pytest.raises(fxprop.FxpropError, match="this model fails")
        if way == "fails"
        else contextlib.nullcontext()
    ):
        CALLS["transform"](model)
    assert left_behind() == []
    assert_equal(state_and_hooks_of(model), before, "the model")
    assert_equal(surroundings(), around, "around it")


@pytest.mark.parametrize(
    "place", ["lru_cache", "cache in a global dict", "class attribute", "plain object", "deque"]
)
@pytest.mark.parametrize("way", ["straight", "value", "fails"])
@pytest.mark.parametrize("call", ["estimate", "layers"])
def test_looking_leaves_nothing_behind_either(call, way, place):
    torch.manual_seed(0)
    model = Keeps(place, way)
    before = state_and_hooks_of(model)
    with (
        pytest.raises(fxprop.FxpropError, match="this model fails")
        if way == "fails"
        else contextlib.nullcontext()
    ):
        CALLS[call](model)
    assert left_behind() == []
    assert_equal(state_and_hooks_of(model), before, "the model")


@pytest.mark.parametrize("frontend", ["auto", "symbolic", "submodules"])
@pytest.mark.parametrize("place", ["lru_cache", "cache in a global dict", "class attribute", "list"])
def test_no_front_end_leaves_anything_behind(place, frontend):
    with contextlib.suppress(fxprop.FxpropError):
        CALLS["transform"](Keeps(place, "straight"), frontend=frontend)
    assert left_behind() == []


@pytest.mark.parametrize("way", ["straight", "shape", "value"])
@pytest.mark.parametrize("place", ["lru_cache", "cache of a method", "cache in a global dict"])
def test_what_was_cached_before_and_is_cached_afterwards_is_real(place, way):
    torch.manual_seed(0)
    model = Keeps(place, way)
    gm, _ = CALLS["transform"](model)
    expected = model.o(torch.relu(model.b(torch.relu(model.a(X)) + grid(12))))
    for module in (gm, model):
        y = module(X)
        assert type(y) is torch.Tensor
        assert torch.equal(y, expected)
    y = CALLS["transform"](Keeps(place, way))[0](X)  # the caches are full now
    assert type(y) is torch.Tensor


class Changes(Net):
    """Its code changes the world, and does not come to change it back."""

    def __init__(self, change, fails):
        super().__init__()
        self.change, self.fails = change, fails

    def forward(self, x):
        if self.change == "grad":
            torch.set_grad_enabled(False)
        if self.change == "dtype":
            torch.set_default_dtype(torch.float64)
        if self.change == "seed":
            torch.manual_seed(4)
        if self.change == "autocast":
            torch.set_autocast_enabled("cpu", True)
        if self.change == "anomaly":
            torch.autograd.set_detect_anomaly(True, check_nan=False)
        if self.change == "training":
            self.train(not self.training)
        if self.change == "hook":
            self.b.register_forward_hook(lambda *args: None)
        if self.change == "requires_grad":
            self.b.requires_grad_(False)
        if self.fails:
            raise RuntimeError("this model fails")
        return self.body(x)


@pytest.fixture
def changed_back():
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_autocast_enabled("cpu", False)
    torch.autograd.set_detect_anomaly(False)


@pytest.mark.usefixtures("changed_back")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize(
    "change",
    ["grad", "dtype", "seed", "autocast", "anomaly", "training", "hook", "requires_grad"],
)
def test_what_code_changes_around_it_is_as_before(change, fails):
    torch.manual_seed(0)
    model = Changes(change, fails)
    seed(3)
    before, around = state_and_hooks_of(model), surroundings()
    with contextlib.suppress(fxprop.FxpropError):  # it may be refused, but then leaves nothing either
        CALLS["transform"](model)
    after = surroundings()
    assert_equal(after, around, "around it")
    assert_equal(state_and_hooks_of(model), before, "the model")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert left_behind() == []


def test_a_library_with_a_cache_of_its_own():
    transformers = pytest.importorskip("transformers", reason="BEiT has a cached function")

    def make():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        return transformers.BeitModel(
            transformers.BeitConfig(image_size=32, use_relative_position_bias=True, **sizes)
        )

    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    model = make()
    gm, _ = fxprop.transform(model.eval(), POLICY, example_kwargs=inputs)
    expected = make().eval()(**inputs).last_hidden_state
    for module in (gm, model):
        y = module(**inputs).last_hidden_state
        assert type(y) is torch.Tensor
        assert torch.equal(y, expected)
    del y
    assert left_behind() == []


# --- the other way round: what the code reaches by ways of its own is the rewritten part


class Thing:
    def __init__(self, module):
        self.module = module


# how code reaches its layer `b` otherwise than by `self.b`
REACHED = {
    "a plain object": lambda net: setattr(net, "get", Thing(net.b)),
    "a list": lambda net: setattr(net, "get", [net.b]),
    "a dict": lambda net: setattr(net, "get", {"b": net.b}),
    "a weak reference": lambda net: setattr(net, "get", weakref.ref(net.b)),
    "a closure": lambda net: setattr(net, "get", (lambda layer: lambda: layer)(net.b)),
    "a partial": lambda net: setattr(net, "get", functools.partial(lambda layer: layer, net.b)),
}


class Reaches(Net):
    def __init__(self, how):
        super().__init__()
        REACHED[how](self)

    def forward(self, x):
        get = self.get
        layer = get.module if isinstance(get, Thing) else get[0] if type(get) is list else None
        layer = layer or (get["b"] if type(get) is dict else get())
        return self.o(F.dropout(torch.relu(layer(torch.relu(self.a(x)))), 0.5, layer.training))


@pytest.mark.parametrize("how", REACHED)
def test_a_layer_reached_by_a_way_of_its_own_is_rewritten_and_switched(how):
    torch.manual_seed(0)
    model = Reaches(how).train()
    gm, report = transform(model)
    assert [layer["name"] for layer in report.to_dict()["layers"]] == ["a", "b", "o"]
    torch.manual_seed(0)
    assert_behaves_like(gm, Reaches(how), modes=(True, False, True))
    assert 1 <= sparse_rows(gm.b) <= 4
    gm.eval()
    assert torch.equal(gm(X), gm(X))
    assert model.training
    assert model.b.training


class Trainer(Net):
    def training_step(self, batch):
        return F.mse_loss(self.body(batch["x"]), batch["y"])

    def own_loop(self, x):
        return sum(layer(torch.relu(self.a(x))).sum() for layer in [self.b])


METHODS = {
    "body": lambda net: net.body(X),
    "training_step": lambda net: net.training_step({"x": X, "y": torch.ones(4, 4)}),
    "own_loop": lambda net: net.own_loop(X),
    "a layer by itself": lambda net: net.b(torch.relu(net.a(X))),
    "by its class": lambda net: Trainer.body(net, X),
    "forward": lambda net: net.forward(X),
}


@pytest.mark.parametrize("frontend", ["auto", "submodules"])
@pytest.mark.parametrize("how", METHODS)
def test_layers_called_otherwise_than_by_forward_are_sparse_too(how, frontend):
    torch.manual_seed(0)
    model = Trainer()
    untouched = copy.deepcopy(model)
    gm, _ = transform(model, frontend=frontend)
    for module, most in ((gm, 4), (copy.deepcopy(gm), 4), (fxprop.restore(gm), 12)):
        module.zero_grad()
        ours = METHODS[how](module)
        assert torch.equal(ours, METHODS[how](untouched))
        ours.square().sum().backward()
        assert 1 <= sparse_rows(module.b) <= most
        assert most == 4 or sparse_rows(module.b) > 4
