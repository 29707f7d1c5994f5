"""Random programs behave when transformed as they are written, call after call.

`FXPROP_FRONTEND=submodules pytest tests/test_random_programs.py` draws for another front-end than "auto".
"""

import dataclasses
import os
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from programs import CONSTRUCTS, GIVES, GLOBAL, TAKES, WIDTH, Program, Stage, programs, ramp, reset_globals
from torch import Tensor, fx, nn

import fxprop

FRONTEND: Any = os.environ.get("FXPROP_FRONTEND", "auto")
OF_MODULES = set(vars(nn.Module())) - {"training"}
# training mode, size of the batch, what the call is inside of
CALLS = [
    *((True, 4, ""), (True, 3, ""), (True, 4, "autocast")),
    *((False, 4, ""), (False, 4, "no_grad"), (False, 2, "")),
]

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the nets are tiny
    yield
    torch.set_num_threads(threads)


def plain(value: Any) -> Any:
    """A copy of what an attribute holds, to be compared; modules and functions are all the same."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, SimpleNamespace):
        return plain(vars(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else "..."


def observable(module: nn.Module) -> dict[str, Any]:
    """What can be seen of a module without calling it."""
    return {
        name: {
            **{key: plain(value) for key, value in vars(part).items() if key not in OF_MODULES},
            **plain(part._parameters),
            **plain(part._buffers),
        }
        for name, part in module.named_modules()
    }


def surroundings() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "random": hash(random.getstate()),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def differences(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Where `ours` is not what `theirs` is; what only `ours` has in a dict does not count."""
    if type(ours) is not type(theirs):
        yield f"{where}: {type(ours).__name__} {ours}, not {type(theirs).__name__} {theirs}"
    elif isinstance(theirs, Tensor):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            yield f"{where}: {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}"
        elif ours.requires_grad != theirs.requires_grad:
            yield f"{where}: requires_grad is {ours.requires_grad}"
        elif not torch.equal(ours, theirs):
            yield f"{where}: {(ours.double() - theirs.double()).abs().max():.2g} off"
    elif dataclasses.is_dataclass(theirs):
        yield from differences(vars(ours), vars(theirs), where)
    elif isinstance(theirs, dict):
        for key, value in theirs.items():
            yield from differences(ours.get(key, "missing"), value, f"{where} {key}")
    elif isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            yield f"{where}: {len(ours)} items, not {len(theirs)}"
        for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            yield from differences(one, other, f"{where}[{index}]")
    elif ours != theirs:
        yield f"{where}: {ours}, not {theirs}"


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument or an output."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return tensors(vars(value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def call(module: nn.Module, program: Program, number: int) -> dict[str, Any]:
    """All that can be seen of one call and its backward."""
    training, batch, under = CALLS[number % len(CALLS)]
    module.train(training)
    module.zero_grad()
    args, kwargs = program.inputs(number + 1, batch)
    torch.manual_seed(number)
    random.seed(number)
    with (
        torch.set_grad_enabled(under != "no_grad"),
        torch.autocast("cpu", torch.bfloat16, enabled=under == "autocast"),
    ):
        output = module(*args, **kwargs)
    losses = [y.float().square().sum() for y in tensors(output) if y.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    gradients = {
        **{f"of {name}": plain(parameter.grad) for name, parameter in module.named_parameters()},
        "of inputs": [x.grad for x in tensors((args, kwargs))],
    }
    return {
        "output": output,
        "attribute": observable(module),
        "around": surroundings(),
        "global": plain(GLOBAL),
        "gradient": gradients if program.keep == 1.0 else {},
    }


def other_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t * 0.5 + 0.1 if t.is_floating_point() else t + 2 for key, t in state.items()}


def run(module: Any, program: Program) -> dict[str, Any]:
    """Every kind of call, twice: before and after the module was changed and loaded."""
    reset_globals()
    seen = {}
    for number in range(2 * len(CALLS)):
        if number == len(CALLS):
            torch.manual_seed(0)
            if program.change:
                module.change()
            module.load_state_dict(other_values(module.state_dict()))
        training, batch, under = CALLS[number % len(CALLS)]
        mode = "train" if training else "eval"
        seen[f"call {number} ({mode}, batch {batch}{under and ', ' + under}):"] = call(
            module, program, number
        )
    return seen


def transformed(model: nn.Module, program: Program) -> nn.Module:
    """What fxprop makes of the model, which stays as it was."""
    reset_globals()
    args, kwargs = program.inputs()
    before, around = observable(model), surroundings()
    tensors_before = [id(t) for t in model.state_dict(keep_vars=True).values()]
    policy = fxprop.Policy(keep=program.keep, when="always")
    gm = fxprop.transform(model, policy, args, example_kwargs=kwargs, frontend=FRONTEND).module
    after = observable(model)
    changed = [
        *differences(after, before),
        *differences(before, after),
        *differences(surroundings(), around),
    ]
    assert not changed, f"{program}: the transform changed\n" + "\n".join(changed)
    assert [id(t) for t in model.state_dict(keep_vars=True).values()] == tensors_before
    cached = [*GLOBAL.cache.values(), ramp(WIDTH), ramp(4)]
    assert all(type(t) is Tensor for t in cached), f"{program}: left in a cache: {cached}"
    return gm


def check(program: Program) -> None:
    try:
        expected = run(program.build(), program)
        model = program.build()  # stays alive, as weak references to it must
        found = list(differences(run(transformed(model, program), program), expected))
    except Exception as error:
        error.add_note(str(program))
        raise
    assert not found, f"{program}: {len(found)} differences\n" + "\n".join(found[:12])


def alone(name: str, nested: bool = False, **options: Any) -> Program:
    return Program((Stage(name, nested=nested),), **options)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_every_construct_is_plain_pytorch_and_is_noticed(name, monkeypatch):
    program = alone(name, change=True, requires_grad=True)
    expected = run(program.build(), program)
    assert not list(differences(run(program.build(), program), expected))
    assert all(t.isfinite().all() for seen in expected.values() for t in tensors(seen["output"]))
    without = dataclasses.replace(CONSTRUCTS[name], step=lambda m, h: h)
    monkeypatch.setitem(CONSTRUCTS, name, without)
    assert list(differences(run(program.build(), program), expected))


@pytest.mark.parametrize(
    "name", ["counts", "fixed_noise", "is_tensor", "training", "autocast", "python_random"]
)
def test_a_frozen_graph_is_noticed(name):
    program = alone(name)
    frozen = fx.symbolic_trace(program.build())
    assert list(differences(run(frozen, program), run(program.build(), program)))


@pytest.mark.parametrize("where", ["inline", "nested"])
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_every_construct_transformed(name, where):
    nested = where == "nested"
    check(alone(name, nested=nested, change=True, requires_grad=nested))


@pytest.mark.parametrize("takes", TAKES)
def test_every_input_transformed(takes):
    check(alone("used_twice", takes=takes))


@pytest.mark.parametrize("gives", GIVES)
def test_every_output_transformed(gives):
    check(alone("used_twice", gives=gives))


def draw(shard: int, count: int) -> None:
    @seed(shard)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(program=programs)
    def every(program):
        check(program)

    every()


@pytest.mark.parametrize("shard", range(6))
def test_random_programs(shard):
    draw(shard, 25)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(100, 110))
def test_many_random_programs(shard):
    draw(shard, 500)
