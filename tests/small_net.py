"""A small network with groups, norms and activations, and what the tests of shares do with it."""

import torch
from torch import nn

import fxprop


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(144, 12),
        nn.GELU(),
        nn.Linear(12, 4),
    )


IMAGES = (4, 3, 8, 8)


def gradients(module, x):
    """Of the parameters; zeros where none arrives."""
    parameters = list(module.parameters())
    found = torch.autograd.grad(module(x).square().sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def transformed(policy, model=None, **kwargs):
    torch.manual_seed(1)
    x = torch.randn(IMAGES)
    model = network() if model is None else model
    return (*fxprop.transform(model, policy, (x,), **kwargs), x)


def always(**settings):
    return fxprop.Policy(when="always", **settings)
