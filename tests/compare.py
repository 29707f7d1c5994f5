"""Comparisons: of tensors and state, of a model with an untouched one, of what a call leaves behind."""

import contextlib
import copy
import inspect
import itertools
import random
import re
import warnings
import weakref
from collections.abc import Iterator, ValuesView

import numpy as np
import torch
from models import X
from torch import fx


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
    """To the bit, and of the same type; NaN is equal to itself."""
    if isinstance(theirs, Iterator | ValuesView):
        ours, theirs = list(ours), list(theirs)
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


def gradients(module, x):
    """Of the parameters that want one, in their order."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(module(x).square().sum(), parameters)


def gradients_by_name(model, x, run=None):
    """Of a backward; `run` is what calls the model."""
    model.zero_grad()
    (model if run is None else run)(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(ours, theirs, tolerance=1e-9):
    """One tensor after the other."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
