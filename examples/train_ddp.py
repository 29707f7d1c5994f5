"""Train on several processes with a cheaper backward: DistributedDataParallel and a keep schedule.

torchrun --nproc-per-node 2 examples/train_ddp.py [--sync-selection]   # all keep the same channels
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision import models

import fxprop


def data(size):
    """Noise with a bright row, whose place is its class; your data here."""
    labels, images = torch.randint(0, 4, (256,)), torch.randn(256, 3, size, size)
    images[torch.arange(256), :, labels * (size // 4)] += 2
    return TensorDataset(images, labels)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sync-selection", action="store_true")
    for name, default in {"keep": 0.1, "epochs": 4, "batch": 16, "size": 32}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same model and data everywhere; the sampler gives each process its part
    dataset = data(args.size)
    loader = DataLoader(dataset, args.batch, sampler=DistributedSampler(dataset))
    policy = fxprop.Policy(keep=args.keep, sync_selection=args.sync_selection)
    example = torch.empty(args.batch, 3, args.size, args.size)
    gm, _ = fxprop.transform(models.resnet18(num_classes=4), policy, (example,))
    ddp = nn.parallel.DistributedDataParallel(gm)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.02, momentum=0.9)
    schedule = fxprop.schedules.Linear(1.0, args.keep, steps=args.epochs - 1)
    scheduler = fxprop.KeepScheduler(gm, schedule)
    for epoch in range(args.epochs):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(ddp(images), labels)
            loss.backward()
            optimizer.step()
        rows = gm.layer4[1].conv2.weight.grad.flatten(1).any(1).sum().item()
        if dist.get_rank() == 0:
            keep, rows = scheduler.get_last_keep()[0], f"{rows} of 512 rows kept"
            print(f"epoch {epoch + 1}: keep {keep:.2f}, loss {loss:.4f}, {rows}")
        scheduler.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
