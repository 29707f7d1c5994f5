"""How far optimizers move a row of a weight that gets its gradient in few of the steps; every step = 1.

python examples/benchmarks/rare_rows.py --shares 0.5 0.25 0.05

Each row has a gradient of mean 1 and deviation --noise, which it gets with the given probability, and
otherwise zero. "zeros": as the backward gives it. "1/p": weighted by the inverse probability. "lazy": steps
without a gradient leave the row and its state alone, as SparseAdam does. The distance is the mean over the
rows and over --steps; where a column is below 1, a higher learning rate makes up for it.
"""

import argparse
from collections.abc import Callable

import torch
from tabulate import tabulate

Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD, momentum 0.9": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adam, betas 0.9 and 0.99": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.9, 0.99)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


def distance(make: Make, share: float, form: str, noise: float, steps: int, rows: int) -> float:
    """How far rows move in the mean, against their gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(rows, requires_grad=True)
    optimizer = make([weight])
    for _ in range(steps):
        gradient = 1 + noise * torch.randn(rows, generator=generator)
        selected = torch.rand(rows, generator=generator) < share
        weight.grad = torch.where(selected, gradient / share if form == "1/p" else gradient, 0.0)
        optimizer.step()
    return -weight.mean().item()


def lazy(share: float, noise: float, steps: int, rows: int) -> float:
    """The same for SparseAdam."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(rows, 1, requires_grad=True)
    optimizer = torch.optim.SparseAdam([weight], lr=1e-3)
    for _ in range(steps):
        gradient = 1 + noise * torch.randn(rows, 1, generator=generator)
        kept = (torch.rand(rows, generator=generator) < share).nonzero().T
        weight.grad = torch.sparse_coo_tensor(kept, gradient[kept[0]], weight.shape, check_invariants=True)
        optimizer.step()
    return -weight.mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.05])
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=500)
    args = parser.parse_args(argv)
    of = args.noise, args.steps, args.rows
    table = []
    for name, make in OPTIMIZERS.items():
        for form in ("zeros", "1/p"):
            full = distance(make, 1.0, form, *of)
            table.append((name, form, *(f"{distance(make, s, form, *of) / full:.2f}" for s in args.shares)))
    full = lazy(1.0, *of)
    table.append(("SparseAdam", "lazy", *(f"{lazy(s, *of) / full:.2f}" for s in args.shares)))
    headers = ("optimizer", "gradient", *(f"{s:.0%} of the steps" for s in args.shares))
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
