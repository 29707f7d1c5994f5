"""Dense against transformed on the clock: forward, backward and whole step, interleaved in one process.

python examples/benchmarks/backward_time.py resnet50 --keep 0.25 0.1 0.05

Every round times one step of each variant, so that a slow moment hits all of them. Printed are medians
over the rounds, ratios to dense, and the spread (interquartile range) of the per-round ratios.
"""

import argparse
import os
import statistics
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torchvision import models

import fxprop


def step(module, optimizer, x, labels):
    """Seconds of (forward, backward, optimizer)."""

    def now():
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    optimizer.zero_grad()
    start = now()
    loss = F.cross_entropy(module(x), labels)
    forward = now()
    loss.backward()
    backward = now()
    optimizer.step()
    return forward - start, backward - forward, now() - backward


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a torchvision classification model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.1, 0.05])
    parser.add_argument("--select", default="channel")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = models.get_model(args.model).to(args.device)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    labels = torch.randint(0, 1000, (args.batch,), device=args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    variants, savings = {"dense": model}, {"dense": 0.0}
    for keep in args.keep:
        name = f"keep {keep:g}"
        policy = fxprop.Policy(keep=keep, select=args.select)
        variants[name], report = fxprop.transform(model, policy, (x,))
        savings[name] = report.totals.saving

    times = {name: [] for name in variants}
    for round_ in range(args.rounds + 2):  # two rounds of warm-up
        for name, module in variants.items():
            seconds = step(module, optimizer, x, labels)
            if round_ >= 2:
                times[name].append(seconds)

    rows = []
    for name, rounds in times.items():
        milliseconds = [1000 * statistics.median(part) for part in zip(*rounds, strict=True)]
        pairs = list(zip(times["dense"], rounds, strict=True))
        rows.append(
            [
                name,
                f"{100 * savings[name]:.1f} %",
                *(f"{value:.0f}" for value in milliseconds[:2]),
                quartiles([dense[1] / own[1] for dense, own in pairs]),
                quartiles([sum(dense) / sum(own) for dense, own in pairs]),
            ]
        )
    headers = ("", "FLOPs saved", "forward ms", "backward ms", "backward speed-up", "whole-step speed-up")
    allocator = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")} or "default"
    print(
        f"{args.model}, batch {args.batch}, {args.size}x{args.size}, select={args.select}, {args.device}, "
        f"{args.threads} threads, torch {torch.__version__}, allocator {allocator}, {args.rounds} rounds"
    )
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
