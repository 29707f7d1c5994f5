"""Nets whose code does more than compute, and what it takes to compare them with an untouched one."""

import contextlib
import copy
import inspect
import itertools
import random
import re
import warnings
import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxprop

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
POLICY = fxprop.Policy(keep=0.3, when="always")
# a module that finds itself changed may say, once, that it now runs as it is written
MAY_RUN_AS_WRITTEN = pytest.mark.filterwarnings("ignore:.*runs? as written:UserWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def body(self, x):
        return self.o(torch.relu(self.b(torch.relu(self.a(x)))))

    def forward(self, x):
        return self.body(x)


def sparse_rows(linear):
    """How many rows of a Linear's gradient are not zero; with keep=0.3 of 12, at most 4."""
    return int((linear.weight.grad.abs().sum(1) > 0).sum())


def transform(model, *args, **kwargs):
    """Ours, with the policy of these tests."""
    inputs = args if kwargs.get("example_kwargs") else args or (X,)
    return fxprop.transform(model, POLICY, inputs, **kwargs)


class Case(NamedTuple):
    forward: object
    setup: object
    inputs: tuple
    kwargs: dict

    def make(self):
        torch.manual_seed(0)
        model = type(self.forward.__name__, (Net,), {"forward": self.forward})()
        if self.setup is not None:
            self.setup(model)
        return model


class Cases(dict):
    """Forwards by name. `@cases(setup)` adds one; `setup` prepares each Net that gets this forward."""

    def __call__(self, setup=None, inputs=(X,), **kwargs):
        def add(forward):
            self[forward.__name__] = Case(forward, setup, inputs, kwargs)
            return forward

        return add

    @classmethod
    def of(cls, *inputs, **forwards):
        """Those whose code is one expression."""
        cases = cls()
        for name, forward in forwards.items():
            cases[name] = Case(forward, None, inputs, {})
        return cases


def saved_tensors(call):
    """How many tensors autograd saves outside of checkpoints."""
    number = 0

    def pack(tensor):
        nonlocal number
        number += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return number


def frozen(value, seen=()):
    """`value` as it is now, in plain types: what is compared when state is."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    if isinstance(value, itertools.count):
        return repr(value)
    # what is not state, or holds itself
    if id(value) in seen or callable(value) or isinstance(value, fx.Graph | weakref.ReferenceType):
        return None
    seen = (*seen, id(value))
    if isinstance(value, dict):
        return {str(key): frozen(item, seen) for key, item in value.items()}
    if not hasattr(value, "__dict__") or hasattr(value, "__iter__"):
        return [frozen(item, seen) for item in value] if hasattr(value, "__iter__") else repr(value)
    return {key: frozen(item, seen) for key, item in vars(value).items()}


def state_of(model):
    """Parameters, buffers, flags and the public attributes that are not torch's own."""
    state = {key: frozen(value) for key, value in model.state_dict(keep_vars=True).items()}
    for name, module in model.named_modules():
        own = not type(module).__module__.startswith("torch.")
        public = vars(module) if own else {"training": module.training}
        state |= {f"{name}:{key}": frozen(item) for key, item in public.items() if not key.startswith("_")}
        state |= {f"{name}:{key}": frozen(buffer) for key, buffer in module.named_buffers(recurse=False)}
    return state


def state_and_hooks_of(model):
    """Of a model that was given to fxprop, and stays as it was."""
    hooks = {
        f"{name}:{key}": len(item)
        for name, module in model.named_modules()
        for key, item in vars(module).items()
        if key.endswith("_hooks") and isinstance(item, dict)
    }
    return {**state_of(model), **hooks}


def equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        same = type(ours) is type(theirs) and ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return same and torch.allclose(ours, theirs, atol=0, rtol=0, equal_nan=True)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def assert_equal(ours, theirs, what):
    """Of dicts, only the keys that `theirs` has: a module that was traced has more of its own."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        different = {
            key: (ours.get(key, "missing"), theirs[key])
            for key in theirs
            if not (key in ours and equal(ours[key], theirs[key]))
        }
        assert not different, f"{what}: (ours, theirs) = {different}"
    else:
        assert equal(ours, theirs), f"{what}: ours {ours}, theirs {theirs}"


def random_states():
    return {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()],
    }


def surroundings():
    """What a call may not leave changed around it, whatever the model's code does."""
    return {
        **random_states(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "autocast dtype": str(torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "modes": [len(torch.overrides._get_current_function_mode_stack())],
    }


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def outcome(module, inputs=(X,), kwargs=None, step=0):
    """What a call returns and leaves behind, and in training which parameters then have a gradient."""
    inputs, kwargs = copy.deepcopy((inputs, kwargs or {}))
    module.zero_grad()
    seed(step)
    output = module(*inputs, **kwargs)
    after = random_states()
    if isinstance(output, torch.Tensor) and output.requires_grad:
        output.sum().backward()
        output = output.detach()
    gradients = sorted(name for name, p in module.named_parameters() if p.grad is not None)
    return {
        "output": output,
        "random numbers": after,
        "gradients": gradients,
        "grad mode": torch.is_grad_enabled(),
    }


def assert_behaves_like(module, untouched, inputs=(X,), kwargs=None, modes=(True, False, True), steps=2):
    """Call after call, in train and eval mode."""
    for turn, mode in enumerate(modes):
        module.train(mode)
        untouched.train(mode)
        for step in range(steps):
            theirs = outcome(untouched, inputs, kwargs, step)
            ours = outcome(module, inputs, kwargs, step)
            where = f"training = {mode}, turn {turn}, call {step}"
            assert_equal(ours, theirs, where)
            assert_equal(state_of(module), state_of(untouched), where)


def names_the_line(error, case, *children):
    """Whether an error says which line of a case's code, or of functions or children, it is about."""
    for code in (case.forward, *(getattr(child, "forward", child) for child in children)):
        code = inspect.unwrap(code)
        lines, first = inspect.getsourcelines(code)
        file = re.escape(inspect.getsourcefile(code))
        if any(re.search(rf"{file}:{first + number}\b", str(error)) for number in range(len(lines))):
            return True
        if any(line.strip() in str(error) for line in lines if len(line.strip()) > 3):
            return True
    return False


@contextlib.contextmanager
def warned():
    """The list of the warnings that fxprop gives, none of them an error."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield given
