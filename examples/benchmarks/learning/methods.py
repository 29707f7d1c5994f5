"""How the backward is made: each method by its name."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxprop


@dataclass
class Method:
    """A module to train, and what is done to it in the course of a budget."""

    module: nn.Module
    # called before each step with the share of the budget that is spent
    at: Callable[[float], None] = lambda done: None
    # the share of the examples that entered the last backward
    kept: Callable[[], float] = lambda: 1.0
    # after the steps that warm up: forget what they taught
    forget: Callable[[], None] = lambda: None
    # what the report of results says of it
    remark: str = ""
    # seconds that went into planning, which happens once and is no part of the budget
    planning: float = 0.0
    # whether what it does at the end of a budget can be run before its beginning
    warms_up: bool = True


@dataclass(frozen=True)
class Setting:
    """What a method may look at: mini-batches of the training data, their loss, and the clock."""

    batches: list[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    now: Callable[[], float]
    # whether training starts from weights that were trained before
    pretrained: bool

    @property
    def x(self) -> Tensor:
        return self.batches[0][0]


Maker = Callable[[nn.Module, Setting], Method]
METHODS: dict[str, Maker] = {}


def method(name: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        METHODS[name] = make
        return make

    return register


@method("dense")
def dense(model: nn.Module, of: Setting) -> Method:
    """Plain PyTorch."""
    return Method(model)


@method("all-dense")
def all_dense(model: nn.Module, of: Setting) -> Method:
    """A policy that leaves every layer dense: must cost nothing."""
    return Method(fxprop.transform(model, 1.0, (of.x,)).module)


@method("examples-100")
def all_examples(model: nn.Module, of: Setting) -> Method:
    """Part of the mini-batch is possible, and all of it is taken."""
    made = with_examples(0.5)(model, of)
    fxprop.set_keep(made.module, examples=1.0)
    return made


def with_examples(share: Any, first: float = 0.0, **settings: Any) -> Maker:
    """Part of the mini-batch, after a dense part of the budget."""

    def make(model: nn.Module, of: Setting) -> Method:
        policy = fxprop.Policy(examples=share, **settings)
        gm, _ = fxprop.transform(model, policy, (of.x,))
        in_force = [share]

        def at(done: float) -> None:
            wanted = 1.0 if done < first else share
            if wanted != in_force[0]:
                fxprop.set_keep(gm, examples=wanted)
                in_force[0] = wanted

        def kept() -> float:
            last = fxprop.kept_examples(gm)
            return 1.0 if last is None else last.share

        scheduler = fxprop.KeepScheduler(gm, examples=lambda step: share)
        before = scheduler.state_dict()["examples"]

        def forget() -> None:
            scheduler.load_state_dict({**scheduler.state_dict(), "examples": before})

        return Method(gm, at, kept, forget)

    return make


def with_policy(first: float = 0.0, last: float = 0.0, **settings: Any) -> Maker:
    """Sparse layers, between a first and a last part of the budget that are dense."""

    def make(model: nn.Module, of: Setting) -> Method:
        gm, report = fxprop.transform(model, fxprop.Policy(**settings), (of.x,))
        rewritten = sum(layer.status == "rewritten" for layer in report.layers)
        keep = settings["keep"]
        in_force = [keep]

        def at(done: float) -> None:
            wanted = keep if first <= done < 1 - last else 1.0
            if wanted != in_force[0]:
                fxprop.set_keep(gm, wanted)
                in_force[0] = wanted

        remark = f"{rewritten} of {len(report.layers)} layers"
        return Method(gm, at if first or last else lambda done: None, remark=remark)

    return make


def frozen(*parts: str, then: Maker = dense) -> Maker:
    """Without gradients for the parts of the model whose names begin so."""

    def make(model: nn.Module, of: Setting) -> Method:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(parts))
        return then(model, of)

    return make


METHODS["examples-auto"] = with_examples("auto")
METHODS["examples-auto-late"] = with_examples("auto", first=0.2)
METHODS["examples-50"] = with_examples(0.5)
METHODS["examples-50-late"] = with_examples(0.5, first=0.2)
METHODS["examples-50-random"] = with_examples(0.5, examples_select="random")
# paper: what 1706.06197 and 1709.05804 propose
METHODS["channel-25"] = with_policy(keep=0.25, score="l2")
METHODS["channel-25-ends"] = with_policy(keep=0.25, score="l2", first=0.2, last=0.1)
METHODS["channel-5"] = with_policy(keep=0.05, score="l2")
METHODS["channel-25-random"] = with_policy(keep=0.25, score="random")
METHODS["element-5"] = with_policy(keep=0.05, select="element")
METHODS["frozen-2"] = frozen("stem", "stage1")
METHODS["frozen-2-auto"] = frozen("stem", "stage1", then=with_examples("auto"))
METHODS["frozen-3"] = frozen("stem", "stage1", "stage2")
METHODS["frozen-3-auto"] = frozen("stem", "stage1", "stage2", then=with_examples("auto"))


@method("recommended")
def recommended(model: nn.Module, of: Setting) -> Method:
    """By fxprop.recommend: at once, or in fine-tuning after a tenth of the budget for a new head alone."""
    gm, _ = fxprop.transform(model, 1.0, (of.x,))
    made = Method(gm)
    *_, last = (name for name, _ in gm.named_parameters())
    head = last.rpartition(".")[0] + "."
    others = [p for name, p in gm.named_parameters() if of.pretrained and not name.startswith(head)]
    for parameter in others:
        parameter.requires_grad_(False)

    def plan() -> None:
        start = of.now()
        for parameter in others:
            parameter.requires_grad_(True)
        batches, loss = of.batches, of.loss
        plan = fxprop.recommend(gm, batches, lambda gm, b: loss(gm(b[0]), b[1]), freeze=of.pretrained)
        made.remark = str(plan).partition("\n")[0].partition(": ")[2]
        made.planning = of.now() - start

    def at(done: float) -> None:
        if done >= 0.1 and not made.remark:
            plan()

    def kept() -> float:
        last = fxprop.kept_examples(gm)
        return 1.0 if last is None else last.share

    made.kept = kept
    if of.pretrained:
        made.at, made.warms_up = at, False
    else:
        plan()
    return made


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Leaves parameters, buffers and torch's generator as they were."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        with torch.no_grad():
            for name, value in module.state_dict().items():
                value.copy_(before[name])
        module.zero_grad()
