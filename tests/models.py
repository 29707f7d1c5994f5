"""Models of the tests: nets whose code does more than compute, and small ones."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

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


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )


IMAGES = torch.randn(2, 3, 6, 6)  # for `small`


MARKUP = "<script>alert(1)</script>"


def with_names_that_are_markup():
    """Names that are markup."""
    model = nn.Sequential()
    model.add_module(MARKUP, nn.Linear(4, 8))
    model.add_module("<img src=x onerror=alert(1)>", nn.Linear(8, 8))
    model.add_module("out", nn.Linear(8, 2))
    return model


def transformed(model, shape, keep=0.05, **settings):
    policy = fxprop.Policy(keep=keep, **settings)
    return fxprop.transform(model, policy, (torch.empty(shape, device="meta"),))
