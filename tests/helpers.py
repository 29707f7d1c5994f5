"""A small model, and a way to see that a call left a model alone."""

import torch
from torch import nn


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )


X = torch.randn(2, 3, 6, 6)


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
