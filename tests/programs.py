"""Random programs: modules whose forward does what tracing with torch.fx silently freezes or loses.

A `Construct` is one such thing to do; a `Program` is a recipe that builds a module from several. All are
plain PyTorch, and deterministic once the generators of torch and of `random` are seeded.
"""

import copy
import random
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, make_dataclass
from functools import lru_cache, reduce
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6
GLOBAL = SimpleNamespace(calls=0, cache={})
CONSTRUCTS: dict[str, "Construct"] = {}
Step = Callable[[Any, Tensor], Tensor]


@lru_cache
def ramp(width: int) -> Tensor:
    return torch.linspace(0.5, 1.5, width)


def reset_globals() -> None:
    """What all instances share is again as at the start of a process."""
    GLOBAL.calls = 0
    GLOBAL.cache.clear()
    ramp.cache_clear()


@dataclass(frozen=True)
class Construct:
    """A part of a forward: `step` maps features [batch, WIDTH] to features, with what `adds` has put on `m`.

    `adds` are attributes by name, each a value or a function of the module; `change` is what a user does
    to the finished module between two calls; `base` a class that the module inherits from.
    """

    step: Step
    adds: Mapping[str, Any]
    change: Callable[[Any], object] = lambda m: None
    base: type | None = None

    def add_to(self, m: nn.Module) -> None:
        for name, value in self.adds.items():
            setattr(m, name, value(m) if callable(value) else copy.deepcopy(value))


def line(step: Any, change: Any = Construct.change, base: type | None = None, **adds: Any) -> Construct:
    return Construct(step, adds, change, base)


def construct(**adds: Any) -> Callable[[Step], Step]:
    def register(step: Step) -> Step:
        CONSTRUCTS[step.__name__] = Construct(step, adds)
        return step

    return register


def linear(_: Any) -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def dropping(_: Any) -> nn.Module:
    """A child that shows which mode it is in."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4))


def rows(h: Tensor) -> Tensor:
    return h.detach().float().mean(0)


@construct(counted=nn.Buffer(torch.tensor(0)))
def buffer_counts(m, h):
    m.counted += 1
    return h + 0.1 * m.counted


@construct(average=nn.Buffer(torch.zeros(WIDTH)))
def buffer_averages(m, h):
    if m.training:
        m.average.mul_(0.9).add_(rows(h), alpha=0.1)
    return h - m.average


@construct(last=nn.Buffer(torch.zeros(WIDTH), persistent=False))
def buffer_rebound(m, h):
    previous, m.last = m.last, rows(h)
    return h + 0.5 * previous


@construct(decayed=torch.ones(WIDTH))
def tensor_rebound(m, h):
    m.decayed = m.decayed * 0.9
    return h * m.decayed


@construct()
def output_kept(m, h):
    m.features = h.detach() * 2
    return m.features.tanh() + h


@construct()
def items_assigned(m, h):
    y = torch.zeros_like(h)
    y[:, 1:] = h[:, :-1]
    return y


@construct(count=0)
def counts(m, h):
    m.count += 1
    return h * (1 + 0.1 * m.count)


@construct(sizes=[])
def appends(m, h):
    m.sizes.append(h.shape[0])
    return h + 0.1 * len(m.sizes)


@construct(means=[])
def appends_tensors(m, h):
    m.means.append(rows(h))
    return h + torch.stack(m.means[-2:]).sum(0)


@construct(cache={})
def caches_by_shape(m, h):
    key = tuple(h.shape)
    if key not in m.cache:
        m.cache[key] = torch.full(key, 1.5 + len(m.cache))
    return h * m.cache[key]


@construct(first=None)
def caches_first(m, h):
    if m.first is None:
        m.first = rows(h)
    return h - m.first


@construct(log=lambda m: SimpleNamespace(calls=0))
def helper_counts(m, h):
    m.log.calls += 1
    return h * (1 + 0.1 * m.log.calls)


@construct()
def global_counts(m, h):
    GLOBAL.calls += 1
    return h + 0.1 * GLOBAL.calls


@construct()
def global_caches(m, h):
    key = int(h.shape[0])
    if key not in GLOBAL.cache:
        GLOBAL.cache[key] = torch.full((WIDTH,), 0.5 * key)
    return h + GLOBAL.cache[key]


@construct(warmth=nn.Buffer(torch.tensor(0)))
def buffer_values(m, h):
    m.warmth += 1
    return h + 1 if m.warmth > 2 else h * 2


@construct()
def tries_view(m, h):
    try:
        return h.view(WIDTH + 1, -1)
    except RuntimeError:
        return h * 2


@construct(teacher=linear)
def no_grad(m, h):
    with torch.no_grad():
        target = m.teacher(h)
    return h * target


@construct(trained=linear)
def set_grad_enabled(m, h):
    with torch.set_grad_enabled(m.training and torch.is_grad_enabled()):
        return h + m.trained(h)


@construct(low=linear)
def autocast(m, h):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.low(h)
    return h + y.float()


class Deployable(nn.Module):
    def train(self, mode: bool = True) -> "Deployable":
        self.deployed = not mode
        return super().train(mode)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


CONSTRUCTS |= {
    # tensors written in place
    "tensor_written": line(lambda m, h: h + 0.1 * m.total.add_(rows(h)), total=torch.zeros(WIDTH)),
    "index_added": line(lambda m, h: h + torch.zeros(WIDTH).index_add_(0, torch.arange(WIDTH).flip(0), rows(h))),
    "zeros_like_written": line(lambda m, h: torch.zeros_like(h).add_(h, alpha=0.5)),
    "activated_in_place": line(lambda m, h: F.relu_((h * 2).add_(1))),
    "memoized": line(lambda m, h: h * ramp(WIDTH)),
    "memoized_by_shape": line(lambda m, h: h * ramp(h.shape[0])[:, None]),
    # branches
    "is_tensor": line(lambda m, h: h + 1 if isinstance(h, Tensor) else h * 2),
    "is_sequence": line(lambda m, h: h[0] if isinstance(h, list | tuple) else h * 2),
    "has_shape": line(lambda m, h: h + 1 if hasattr(h, "shape") else h * 2),
    "has_logits": line(lambda m, h: h.logits if hasattr(h, "logits") else h * 2),
    "type_is": line(lambda m, h: h + 1 if type(h) is Tensor else h * 2),
    "training": line(lambda m, h: (m.fast if m.training else m.slow)(h), fast=linear, slow=linear),
    "flag_of_train": line(lambda m, h: h + 1 if m.deployed else h * 2, base=Deployable, deployed=False),
    "grad_mode": line(lambda m, h: h + 1 if torch.is_grad_enabled() else h * 2),
    "autocast_state": line(lambda m, h: h + 1 if torch.is_autocast_enabled("cpu") else h * 2),
    "requires_grad": line(lambda m, h: h + 1 if h.requires_grad else h * 2),
    "dtype": line(lambda m, h: h + 1 if h.dtype == torch.float32 else h.float() * 2),
    "values": line(lambda m, h: (m.up if h[:, 0].sum() > 0 else m.down)(h), up=linear, down=linear),
    "parameter_values": line(lambda m, h: h * m.gate if m.gate > 0 else h + m.gate, lambda m: m.gate.data.fill_(2.0), gate=nn.Parameter(torch.tensor(-0.7))),
    "item_read": line(lambda m, h: h / (1 + h.detach().abs().mean().item())),
    "loops_over_rows": line(lambda m, h: torch.stack([row * (1 + i) for i, row in enumerate(h)])),
    "shape": line(lambda m, h: h + 1 if h.shape[0] > 3 else h * 2),
    "loops_over_values": line(lambda m, h: reduce(lambda y, _: y.tanh() + 1, range(int(h.detach().abs().sum()) % 3), h)),
    # random numbers
    "fixed_noise": line(lambda m, h: h + 0.1 * torch.randn(WIDTH)),
    "noise": line(lambda m, h: h + 0.1 * torch.randn_like(h) * torch.rand(h.shape[0], 1)),
    "layer_drop": line(lambda m, h: h if m.training and torch.rand(1) < 0.5 else m.often(h), often=linear),
    "python_random": line(lambda m, h: h + 1 if random.random() < 0.5 else h * (1 + random.random())),
    "dropout": line(lambda m, h: F.dropout(h * 2, 0.4, m.training)),
    "own_generator": line(lambda m, h: h + torch.randn(WIDTH, generator=m.generator), generator=lambda m: torch.Generator().manual_seed(3)),
    # regions
    "no_grad_decorated": line(torch.no_grad()(lambda m, h: m.fixed(h)), fixed=linear),
    "autocast_off": line(torch.autocast("cpu", enabled=False)(lambda m, h: m.full(h.float())), full=linear),
    "checkpoint": line(lambda m, h: h + checkpoint(m.redone, h, use_reentrant=False), redone=dropping),
    "checkpoint_reentrant": line(lambda m, h: h + checkpoint(m.again, h, use_reentrant=True), again=dropping),
    "straight_through": line(lambda m, h: h + Sign.apply(h)),
    # children that are shared, hidden, hooked
    "used_twice": line(lambda m, h: m.twice(m.twice(h).tanh()), twice=linear),
    "two_names": line(lambda m, h: m.one(h) + m.other(h), one=linear, other=lambda m: m.one),
    "by_helper": line(lambda m, h: m.holder.layer(h), held=dropping, holder=lambda m: SimpleNamespace(layer=m.held)),
    "by_helper_only": line(lambda m, h: m.hidden.layer(h), hidden=lambda m: SimpleNamespace(layer=dropping(m))),
    "by_weakref": line(lambda m, h: m.weak()(h), referred=dropping, weak=lambda m: weakref.ref(m.referred)),
    "by_closure": line(lambda m, h: m.call(h), closed=dropping, call=lambda m: lambda h: m.closed(h)),
    "by_method": line(lambda m, h: m.bound(h), owner=dropping, bound=lambda m: m.owner.forward),
    "by_list": line(lambda m, h: m.listed[0](h), listed=lambda m: [dropping(m)]),
    "by_tuple": line(lambda m, h: m.pair[1](h), child=dropping, pair=lambda m: (0, m.child)),
    "hooked": line(lambda m, h: m.hooked(h), hooked=linear, handle=lambda m: m.hooked.register_forward_hook(lambda module, args, y: y * 2)),
    # children and attributes that change
    "replaced_before": line(lambda m, h: m.swapped(h) + m.old[0](h), swapped=linear, old=lambda m: [m.swapped], swap=lambda m: m.add_module("swapped", dropping(m))),
    "replaced": line(lambda m, h: m.part(h), lambda m: setattr(m, "part", linear(m)), part=linear),
    "replaced_by_other_kind": line(lambda m, h: m.piece(h), lambda m: setattr(m, "piece", dropping(m)), piece=linear),
    "weight_replaced": line(lambda m, h: F.linear(h, m.matrix), lambda m: setattr(m, "matrix", linear(m).weight), matrix=lambda m: linear(m).weight),
    "attribute": line(lambda m, h: h * m.scale, lambda m: setattr(m, "scale", 0.7), scale=1.5),
    "option": line(lambda m, h: h * m.options.get("s", 2), lambda m: m.options.update(s=3), options={}),
    "depth": line(lambda m, h: nn.Sequential.forward(m.chain[: m.deep], h), lambda m: setattr(m, "deep", 1), chain=lambda m: nn.Sequential(linear(m), linear(m)), deep=2),
}  # fmt: skip

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: linear(None),
    "Conv1d": lambda: nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 1, 3, padding=1), nn.Flatten()),
    "LayerNorm": lambda: nn.Sequential(linear(None), nn.LayerNorm(WIDTH), nn.GELU()),
    "BatchNorm": lambda: nn.Sequential(linear(None), nn.BatchNorm1d(WIDTH), nn.ReLU()),
    "Dropout": lambda: nn.Sequential(nn.Dropout(0.2), linear(None), nn.Tanh()),
}


class Stage(NamedTuple):
    """A construct and the layer after it; `nested`: in a child module of its own."""

    construct: str
    layer: str = "Linear"
    nested: bool = False


class Body(nn.Module):
    """Stages one after the other."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        super().__init__()
        self.steps = [stage.construct for stage in stages]
        self.layers = nn.ModuleList([LAYERS[stage.layer]() for stage in stages])
        for name, layer, nested in stages:
            if nested:
                self.add_module(f"in_{name}", body((Stage(name, layer),)))
            else:
                CONSTRUCTS[name].add_to(self)

    def run(self, h: Tensor) -> Tensor:
        for name, layer in zip(self.steps, self.layers, strict=True):
            nested = getattr(self, f"in_{name}", None)
            h = layer(CONSTRUCTS[name].step(self, h) if nested is None else nested(h))
        return h

    forward = run

    def change(self) -> None:
        for name in self.steps:
            nested = getattr(self, f"in_{name}", None)
            CONSTRUCTS[name].change(self) if nested is None else nested.change()


def body(stages: tuple[Stage, ...], **members: Any) -> Body:
    """A module of a class of its own."""
    bases = [CONSTRUCTS[stage.construct].base for stage in stages if not stage.nested]
    return type("Body", (*filter(None, bases), Body), members)(stages)


Pair = namedtuple("Pair", "out mean")
Output = make_dataclass("Output", ["out", ("aux", Any, None)])
# the forward, and the arguments it is called with
TAKES: dict[str, tuple[Any, Any]] = {
    "tensor": (lambda self, x: self.give(self.run(x)), lambda x, y: ((x,), {})),
    "list": (lambda self, xs: self.give(self.run(sum(xs))), lambda x, y: (([x, y],), {})),
    "tuple": (lambda self, xs: self.give(self.run(xs[0] - xs[1])), lambda x, y: (((x, y),), {})),
    "one or many": (lambda self, x: self.give(self.run(sum(x) if isinstance(x, list | tuple) else x)), lambda x, y: ((x,), {})),
    "varargs": (lambda self, *xs: self.give(self.run(sum(xs[1:], xs[0]))), lambda x, y: ((x, y), {})),
    "dict": (lambda self, batch: self.give(self.run(batch["x"] * batch.get("scale", 2))), lambda x, y: (({"x": x},), {})),
    "dict of more": (lambda self, batch: self.give(self.run(batch["x"] * batch.get("scale", 2))), lambda x, y: (({"x": x, "scale": y},), {})),
    "left out": (lambda self, x, mask=None: self.give(self.run(x if mask is None else x * mask)), lambda x, y: ((x,), {})),
    "keyword": (lambda self, x, mask=None: self.give(self.run(x if mask is None else x * mask)), lambda x, y: ((x,), {"mask": y})),
    "keywords": (lambda self, **batch: self.give(self.run(batch["x"] + batch.get("y", 1))), lambda x, y: ((), {"x": x, "y": y})),
    "flag": (lambda self, x, double=False: self.give(self.run(x * 2 if double else x)), lambda x, y: ((x,), {"double": True})),
}  # fmt: skip
GIVES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, None, 3),
    "list": lambda h: [h, h.mean()],
    "dict": lambda h: {"out": h, "more": {"mean": h.mean()}},
    "ordered dict": lambda h: OrderedDict(out=h),
    "namedtuple": lambda h: Pair(h, h.mean()),
    "dataclass": Output,
}


@dataclass(frozen=True)
class Program:
    """A recipe for modules that are alike, and what is done with them."""

    stages: tuple[Stage, ...]
    takes: str = "tensor"
    gives: str = "tensor"
    training: bool = True
    requires_grad: bool = False
    change: bool = False
    keep: float = 1.0

    def __repr__(self) -> str:
        given = (f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default)
        return f"Program({', '.join(given)})"

    def build(self) -> Body:
        torch.manual_seed(0)
        members = {"forward": TAKES[self.takes][0], "give": staticmethod(GIVES[self.gives])}
        return body(self.stages, **members).train(self.training)

    def inputs(self, seed: int = 0, batch: int = 4) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        pair = (torch.randn(batch, WIDTH, generator=generator) for _ in range(2))
        return TAKES[self.takes][1](*(x.requires_grad_(self.requires_grad) for x in pair))


stages = st.builds(Stage, st.sampled_from(list(CONSTRUCTS)), st.sampled_from(list(LAYERS)), st.booleans())
programs = st.builds(
    Program,
    st.lists(stages, min_size=1, max_size=5, unique_by=lambda stage: stage.construct).map(tuple),
    takes=st.sampled_from(list(TAKES)),
    gives=st.sampled_from(list(GIVES)),
    training=st.booleans(),
    requires_grad=st.booleans(),
    change=st.booleans(),
    keep=st.sampled_from([1.0, 1.0, 0.3]),
)
