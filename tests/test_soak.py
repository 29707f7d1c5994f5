"""Training for long with a schedule: memory, compilations and the loss. `pytest -m slow` trains for longer."""

import gc
import resource

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxprop
from fxprop import schedules

LEVELS = 5


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip


def batch(generator):
    """Bars at one of four places, in noise."""
    y = torch.randint(0, 4, (16,), generator=generator)
    x = 0.5 * torch.randn(16, 1, 8, 8, generator=generator)
    x[torch.arange(16), 0, :, 2 * y] += 1
    return x, y


def alive():
    gc.collect()
    tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects() if type(o) is not type)
    return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("steps", [600, pytest.param(2000, marks=pytest.mark.slow)])
def test_soak(compiled, steps):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    gm, _ = fxprop.transform(cnn(), 0.1, (batch(generator)[0],))
    counter = CompileCounterWithBackend("aot_eager")
    module = torch.compile(gm, backend=counter, fullgraph=True) if compiled else gm
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-3)
    cosine = schedules.Cosine(0.9, 0.1, steps=steps // 2)
    scheduler = fxprop.KeepScheduler(
        module, schedules.Warmup(100, schedules.Interleave(cosine, every=10)), levels=LEVELS
    )
    losses = []
    for step in range(steps):
        x, y = batch(generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step == steps * 3 // 4:  # every level has been seen
            tensors, memory = alive()
    after, peak = alive()
    assert after <= tensors
    assert peak < memory + 8
    assert counter.frame_count <= (LEVELS + 1 if compiled else 0)
    first, last = (sum(part) / len(part) for part in (losses[:50], losses[-50:]))
    assert last < 0.2 * first
