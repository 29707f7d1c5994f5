"""Models whose names, classes, methods and parts are out of the ordinary: they are rewritten like any other."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from compare import assert_behaves_like, equal, state_of
from models import MAY_RUN_AS_WRITTEN, Net, X, sparse_rows, transform
from torch import fx, nn
from torch.fx.passes.split_module import split_module

import fxprop

pytestmark = MAY_RUN_AS_WRITTEN


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}

# --- names

NAMES = [
    *(
        "graph",
        "code",
        "meta",
        "recompile",
        "print_readable",
        "delete_submodule",
        "to_folder",
        "class_name",
    ),
    *(
        "forward_features",
        "input",
        "output",
        "self_",
        "torch",
        "x",
        "nan",
        "device",
        "fx_graphs",
        "root",
        "keep",
    ),
]

KINDS = ("parameter", "buffer", "attribute")


class Has(Net):
    """Has something of this kind under this name."""

    def __init__(self, kind, name):
        super().__init__()
        self.which = name
        if kind == "child":
            self.add_module(name, nn.Linear(6, 6))
        elif kind == "parameter":
            self.register_parameter(name, nn.Parameter(torch.ones(6)))
        elif kind == "buffer":
            self.register_buffer(name, torch.ones(6))
        else:
            setattr(self, name, 2.0)

    def forward(self, x):
        had = getattr(self, self.which)
        return self.body(had(x) if isinstance(had, nn.Module) else x * had)


class HasMethods(Net):
    def graph(self, x):
        return torch.relu(self.a(x))

    def code(self, x):
        return torch.relu(self.b(x))

    def recompile(self, x):
        return self.o(x)

    def forward(self, x):
        return self.recompile(self.code(self.graph(x)))


class HasProperties(Net):
    code = property(lambda self: 2.0)
    graph = property(lambda self: self.b)
    meta = 3.0

    def forward(self, x):
        return self.o(torch.relu(self.graph(self.a(x)))) * self.code * self.meta


class Chain(nn.Sequential):
    """Its children have the names that a GraphModule has use for."""

    def __init__(self):
        super().__init__()
        for name in ("graph", "code", "meta"):
            self.add_module(name, nn.Linear(6, 6))
        self.add_module("recompile", nn.ReLU())


NAMED = {
    **{f"child {name}": functools.partial(Has, "child", name) for name in NAMES},
    **{f"{kind} {name}": functools.partial(Has, kind, name) for kind in KINDS for name in NAMES[:4]},
    "methods": HasMethods,
    "properties": HasProperties,
    "a Sequential": Chain,
    "a Sequential inside": lambda: nn.Sequential(Chain(), nn.Linear(6, 4)),
}

# --- classes

REGISTERED = []


class Slots(Net):
    __slots__ = ("t",)

    def __init__(self):
        super().__init__()
        self.t = 2.0

    def forward(self, x):
        return self.body(x) * self.t


class NeedsAName(Net):
    def __init_subclass__(cls, *, name):
        super().__init_subclass__()
        cls.name = name
        REGISTERED.append(cls)


class WithAName(NeedsAName, name="mine"):
    pass


class Final(Net):
    def __init_subclass__(cls):
        raise TypeError("this class is final")


class Meta(type(nn.Module)):
    def __new__(mcs, name, bases, namespace):
        made = super().__new__(mcs, name, bases, namespace)
        REGISTERED.append(made)
        return made


class OfMeta(Net, metaclass=Meta):
    pass


class NeedsArguments(Net):
    def __new__(cls, width, *args):
        return super().__new__(cls)

    def __init__(self, width):
        super().__init__()
        self.width = width

    def __reduce__(self):
        return (type(self), (self.width,), self.__dict__)


class Strict(Net):
    """Takes no attributes but those it knows."""

    def __setattr__(self, name, value):
        if name not in ("a", "b", "o", "training") and not name.startswith("_"):
            raise AttributeError(f"{name} is no attribute of a Strict")
        super().__setattr__(name, value)


class Empty(Net):
    def __len__(self):
        return 0


class Calls(Net):
    def __call__(self, x, twice=True):
        return super().__call__(2 * x if twice else x)


class Forwards(nn.Module):
    """Gives what it has not from the model inside it."""

    def __init__(self):
        super().__init__()
        self.inner = Net()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args):
        return self.inner(*args)


CLASSES = {
    **{kind.__name__: kind for kind in (Slots, WithAName, Final, OfMeta, Strict, Empty, Calls, Forwards)},
    "NeedsArguments": lambda: NeedsArguments(3),
    "all in one": lambda: nn.Sequential(WithAName(), nn.Linear(4, 6), Slots(), nn.Linear(4, 6), Strict()),
}

# --- parts


class HoldsItself(Net):
    def __init__(self, hold=lambda net: [net]):
        super().__init__()
        self.up = hold(self)


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.__dict__["parent"] = parent

    def forward(self, x):
        return torch.relu(self.fc(x)) * self.parent.scale


class HasAChildThatKnowsIt(Net):
    def __init__(self):
        super().__init__()
        self.scale = 2.0
        self.child = Child(self)

    def forward(self, x):
        return self.o(torch.relu(self.b(self.child(self.a(x)))))


class HoldsItsMethod(Net):
    def __init__(self):
        super().__init__()
        self.function, self.by_name = self.body, {"b": self.b}

    def forward(self, x):
        return self.function(x)


class HasGraphs(nn.Module):
    """With control flow around GraphModules."""

    def __init__(self, split):
        super().__init__()
        self.g = fx.symbolic_trace(Net())
        if split:
            ways = iter([0, 0, 1, 1, 1])
            self.g = split_module(self.g, None, lambda node: next(ways, 1))
        self.o = nn.Linear(4, 4)

    def forward(self, x):
        return self.o(self.g(x if x.sum() < 1e9 else x + 1))


class Differentiates(Net):
    """Returns a gradient, as models of forces do."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.body(x).sum()
            return torch.autograd.grad(energy, x)[0]


class Compiled(Net):
    def __init__(self, what):
        super().__init__()
        self.what = what
        if what == "itself":
            self.compile(backend="eager")
        if what == "child.compile()":
            self.b.compile(backend="eager")
        if what == "torch.compile(child)":
            self.b = torch.compile(self.b, backend="eager")
        self.act = torch.compile(F.relu, backend="eager") if what == "function" else F.relu

    def forward(self, x):
        return self.o(self.act(self.b(self.act(self.a(x)))))


COMPILED = ("itself", "child.compile()", "torch.compile(child)", "function")
PARTS = {
    "a list of itself": HoldsItself,
    "a dict of itself": lambda: HoldsItself(lambda net: {"up": net}),
    "a child that knows its parent": HasAChildThatKnowsIt,
    "its own method": HoldsItsMethod,
    "a GraphModule": lambda: HasGraphs(split=False),
    "split_module": lambda: HasGraphs(split=True),
    "a gradient": Differentiates,
    **{f"compiled: {what}": functools.partial(Compiled, what) for what in COMPILED},
}
ALL = NAMED | CLASSES | PARTS


def made(name):
    torch.manual_seed(0)
    return ALL[name]()


@pytest.mark.parametrize("name", ALL)
def test_it_is_rewritten_and_does_what_it_did(name):
    registered = len(REGISTERED)
    model = made(name)
    gm, report = transform(model)
    layers = {layer["name"].split("#")[0]: layer for layer in report.to_dict()["layers"]}
    matrices = [key.replace("_orig_mod.", "") for key, p in model.named_parameters() if p.ndim == 2]
    if name != "a gradient":  # is of second order, which has no sparse form: some of it may stay dense
        assert {f"{key}.weight".replace("_orig_mod.", "") for key in layers} == set(matrices)
        dense = [layer["reason"] for layer in layers.values() if layer["status"] != "rewritten"]
        assert all("output layer" in reason for reason in dense), dense
    assert isinstance(gm, type(model)) or name == "Final"  # of which there is no subclass
    assert list(gm.state_dict()) == list(model.state_dict())
    assert all(ours is theirs for ours, theirs in zip(gm.parameters(), model.parameters(), strict=True))
    assert_behaves_like(gm, made(name), modes=(True, False), steps=1)
    dense = fxprop.restore(gm)
    assert isinstance(dense, type(model)) or name == "Final"
    assert_behaves_like(dense, made(name), modes=(True, False), steps=1)
    assert len(REGISTERED) == registered


@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize("name", [name for name in ALL if name.removeprefix("child ") not in NAMES[4:]])
def test_it_is_copied_as_the_model_can_be(name, copier):
    try:
        COPIES[copier](made(name))(X)
    except Exception as error:
        pytest.skip(f"the model itself cannot be copied by {copier}: {error}")
    gm, _ = transform(made(name))
    twin = COPIES[copier](gm)
    assert isinstance(twin, type(made(name))) or name == "Final"
    shared = copier == "copy.copy"
    assert all((p is q) == shared for p, q in zip(twin.parameters(), gm.parameters(), strict=True))
    assert_behaves_like(twin, made(name), modes=(True, False), steps=1)
    before = state_of(twin)
    ks = {layer.k for layer in fxprop.set_keep(twin, 0.5).layers if layer.k is not None}
    assert ks <= {2, 3, 6} or name == "a gradient"
    assert equal(before, state_of(twin))
    assert_behaves_like(twin, made(name), modes=(True,), steps=1)
    assert_behaves_like(fxprop.restore(twin), made(name), modes=(True,), steps=1)
    if hasattr(gm, "up"):
        assert next(iter(twin.up)) in ("up", gm if shared else twin)


@pytest.mark.parametrize("copier", COPIES)
def test_a_copy_keeps_what_it_is_told_to(copier):
    gm, _ = transform(Net())
    twin = COPIES[copier](gm)
    fxprop.set_keep(twin, 0.5)
    rows = []
    for module in (gm, twin):
        module.zero_grad()
        module(X).square().sum().backward()
        rows.append(sparse_rows(module.b))
    assert rows[0] <= 4 < rows[1] <= 6


def test_a_model_that_holds_itself_holds_the_rewritten_one():
    gm, _ = transform(HoldsItself())
    assert gm.up[0] is gm
    assert fxprop.restore(gm).up[0] is not gm
