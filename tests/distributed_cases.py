"""Run by torchrun from test_distributed.py: two processes compare with one process on the joined batch."""

import functools
import json
import os
import re
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fxprop

BATCH, RANKS = 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 12)
        self.conv1 = nn.Conv2d(12, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 12, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x)).mean((2, 3))
        return self.fc2(F.relu(self.fc1(x)))


def make(policy, **kwargs):
    torch.manual_seed(0)
    model = Net().double()
    x = torch.empty(BATCH, 3, 8, 8, dtype=torch.double)
    return fxprop.transform(model, policy, (x,), **kwargs)[0]


def data():
    """The joined batch, the same on every rank."""
    torch.manual_seed(1)
    return torch.randn(RANKS * BATCH, 3, 8, 8).double(), torch.randint(0, 5, (RANKS * BATCH,))


def mine(tensor):
    return tensor.chunk(RANKS)[dist.get_rank()]


def step(module, x, y):
    loss = F.cross_entropy(module(x), y)
    loss.backward()
    return loss.detach()


def gradients(module):
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def joined(policy):
    """Loss and gradients of one process on the joined batch."""
    gm = make(policy)
    x, y = data()
    return step(gm, x, y), gradients(gm)


def each_by_its_own(policy):
    """The mean over ranks of the gradients that each has by its own selection."""
    found = []
    for x, y in zip(*(part.chunk(RANKS) for part in data()), strict=True):
        gm = make(policy)
        step(gm, x, y)
        found.append(gradients(gm))
    return {name: sum(grads[name] for grads in found) / RANKS for name in found[0]}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12) for name in ours)


def mean_over_ranks(loss):
    dist.all_reduce(loss)
    return loss / RANKS


def ddp_dense(**options):
    """keep = 1: loss and gradients are those of the joined batch."""
    loss, expected = joined(1.0)
    ddp = DistributedDataParallel(make(1.0), **options)
    x, y = data()
    ours = mean_over_ranks(step(ddp, mine(x), mine(y)))
    assert torch.allclose(ours, loss)
    assert equal(gradients(ddp), expected)


def ddp_sparse(**options):
    """keep < 1: every rank selects by its own gradient."""
    expected = each_by_its_own(0.25)
    gm = make(0.25)
    ddp = DistributedDataParallel(gm, **options)
    x, y = data()
    for _ in range(2):
        ddp.zero_grad()
        step(ddp, mine(x), mine(y))
        assert equal(gradients(ddp), expected)
    assert not equal(expected, joined(0.25)[1]), "the two could not be told apart"


def ddp_examples():
    """examples < 1: every rank keeps of its own examples."""
    policy = fxprop.Policy(examples=0.5, examples_select="top")
    expected = each_by_its_own(policy)
    ddp = DistributedDataParallel(make(policy))
    x, y = data()
    for share in (0.5, 0.75, 0.5):
        ddp.zero_grad()
        fxprop.set_keep(ddp, examples=share)
        step(ddp, mine(x), mine(y))
        assert fxprop.kept_examples(ddp) == (BATCH * share, BATCH)
        assert equal(gradients(ddp), expected) == (share == 0.5)


def ddp_sync_selection(score):
    """sync_selection: the channels, and so the gradients, are those of the joined batch."""
    policy = fxprop.Policy(keep=0.25, score=score, sync_selection=True)
    expected = joined(fxprop.Policy(keep=0.25, score=score))[1]
    gm = make(policy)
    assert "sync_selection = True" in gm.code
    ddp = DistributedDataParallel(gm)
    x, y = data()
    step(ddp, mine(x), mine(y))
    assert equal(gradients(ddp), expected)
    kept = gm.blocks[0].conv1.weight.grad.flatten(1).abs().sum(1).count_nonzero().item()
    assert kept == 6, kept  # 25 % of 24; without it the ranks' choices add up
    step(alone := make(0.25), mine(x), mine(y))
    dist.all_reduce(alone.blocks[0].conv1.weight.grad)
    union = alone.blocks[0].conv1.weight.grad.flatten(1).abs().sum(1).count_nonzero().item()
    assert union > 6, union


def ddp_compiled():
    """The reduction of the scores inside a compiled backward."""
    policy = fxprop.Policy(keep=0.25, sync_selection=True)
    expected = joined(0.25)[1]
    gm = make(policy)
    ddp = DistributedDataParallel(torch.compile(gm, backend="aot_eager", fullgraph=True))
    x, y = data()
    for _ in range(2):
        ddp.zero_grad()
        step(ddp, mine(x), mine(y))
        found = {name.removeprefix("_orig_mod."): grad for name, grad in gradients(ddp).items()}
        assert equal(found, expected)


def ddp_no_sync():
    """Gradients accumulated under no_sync, and given over with the last."""
    gm = make(0.25)
    ddp = DistributedDataParallel(gm)
    x, y = (mine(part) for part in data())
    with ddp.no_sync():
        step(ddp, x, y)
    step(ddp, x, y)
    expected = each_by_its_own(0.25)
    assert equal(gradients(ddp), {name: 2 * grad for name, grad in expected.items()})


def ddp_schedule():
    """Another keep ratio in the middle of training."""
    gm = make(0.25)
    ddp = DistributedDataParallel(gm)
    scheduler = fxprop.KeepScheduler(ddp, fxprop.schedules.Linear(1.0, 0.25, steps=1))
    x, y = (mine(part) for part in data())
    step(ddp, x, y)
    assert equal(gradients(ddp), joined(1.0)[1])
    scheduler.step()
    ddp.zero_grad()
    step(ddp, x, y)
    assert equal(gradients(ddp), each_by_its_own(0.25))


def sharded(policy, **kwargs):
    gm = make(policy, preserve_modules=["blocks.*"], **kwargs)
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in (gm.blocks[0], gm.blocks[1], gm):
        fully_shard(block, mesh=mesh)
    assert isinstance(gm.blocks[0], FSDPModule)
    return gm


def fsdp_dense():
    loss, expected = joined(1.0)
    gm = sharded(1.0)
    x, y = data()
    ours = mean_over_ranks(step(gm, mine(x), mine(y)))
    assert torch.allclose(ours, loss)
    assert equal(gradients(gm), expected)


def fsdp_sparse():
    gm = sharded(0.25)
    x, y = data()
    step(gm, mine(x), mine(y))
    assert equal(gradients(gm), each_by_its_own(0.25))


def fsdp_sync_selection():
    gm = sharded(fxprop.Policy(keep=0.25, sync_selection=True))
    x, y = data()
    step(gm, mine(x), mine(y))
    assert equal(gradients(gm), joined(0.25)[1])


def fsdp_root_alone():
    gm = make(0.25)
    fully_shard(gm, mesh=init_device_mesh("cpu", (RANKS,)))
    x, y = data()
    step(gm, mine(x), mine(y))
    assert equal(gradients(gm), each_by_its_own(0.25))


def fsdp_schedule_and_modes():
    """Another keep ratio, and a switch of modes, after sharding."""
    gm = sharded(0.25)
    x, y = (mine(part) for part in data())
    fxprop.set_keep(gm, 1.0)
    assert isinstance(gm, FSDPModule)
    step(gm, x, y)
    assert equal(gradients(gm), joined(1.0)[1])
    fxprop.set_keep(gm, 0.25)
    gm.eval()
    gm.train()
    assert isinstance(gm.blocks[0], FSDPModule)
    gm.zero_grad()
    step(gm, x, y)
    assert equal(gradients(gm), each_by_its_own(0.25))


def refused(*words):
    return pytest.raises(fxprop.FxpropError, match=".*".join(map(re.escape, words)))


def fsdp_on_modules_that_are_not_called():
    gm = make(0.25)
    fully_shard(gm.blocks[0], mesh=init_device_mesh("cpu", (RANKS,)))
    x, y = data()
    with refused("fully_shard: hooks on blocks.0 do not run", "preserve_modules=[...]"):
        step(gm, mine(x), mine(y))


def tensor_parallel_is_refused():
    gm = make(0.25)
    parallelize_module(gm, init_device_mesh("cpu", (RANKS,)), {"fc1": ColwiseParallel()})
    x, y = data()
    with refused("weight is a DTensor", "For tensor parallelism", "leaf_modules=[...]"):
        step(gm, mine(x), mine(y))


def tensor_parallel_of_a_layer_left_as_a_call():
    gm = make(0.25, leaf_modules=["fc1"])
    expected = joined(1.0)[0]
    parallelize_module(
        gm, init_device_mesh("cpu", (RANKS,)), {"fc1": ColwiseParallel(output_layouts=_replicate())}
    )
    x, y = data()
    assert torch.allclose(step(gm, x, y), expected)


def _replicate():
    from torch.distributed.tensor import Replicate

    return Replicate()


CASES = {
    "ddp_dense": ddp_dense,
    "ddp_dense_bucket_view": functools.partial(ddp_dense, gradient_as_bucket_view=True),
    "ddp_dense_static_graph": functools.partial(ddp_dense, static_graph=True),
    "ddp_sparse": ddp_sparse,
    "ddp_sparse_bucket_view": functools.partial(ddp_sparse, gradient_as_bucket_view=True),
    "ddp_sparse_static_graph": functools.partial(ddp_sparse, static_graph=True),
    "ddp_examples": ddp_examples,
    "ddp_sync_selection_l1": functools.partial(ddp_sync_selection, "l1"),
    "ddp_sync_selection_l2": functools.partial(ddp_sync_selection, "l2"),
    "ddp_compiled": ddp_compiled,
    "ddp_no_sync": ddp_no_sync,
    "ddp_schedule": ddp_schedule,
    "fsdp_dense": fsdp_dense,
    "fsdp_sparse": fsdp_sparse,
    "fsdp_sync_selection": fsdp_sync_selection,
    "fsdp_root_alone": fsdp_root_alone,
    "fsdp_schedule_and_modes": fsdp_schedule_and_modes,
    "fsdp_on_modules_that_are_not_called": fsdp_on_modules_that_are_not_called,
    "tensor_parallel_is_refused": tensor_parallel_is_refused,
    "tensor_parallel_of_a_layer_left_as_a_call": tensor_parallel_of_a_layer_left_as_a_call,
}


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name in sys.argv[2:] or CASES:
        try:
            CASES[name]()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        if dist.get_rank() == 0:
            print(name, flush=True)
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
