"""Accuracy, backward time and FLOPs of the MNIST example, by what is kept of the gradients.

python examples/benchmarks/mnist_table.py --data data --seeds 5 --epochs 6 20 --rates 3e-4 1e-3 3e-3

Every row trains once per seed and learning rate. Rates are constant: accuracy after fewer epochs is read on
the way. Rows take turns within a seed, so that a slow minute hits all of them. With several rates each row
has its best. What is in the file of --out is not run again; several commands may write to it.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from learning.results import Runs
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from mnist_cnn import train

ROWS = {
    "dense": ("dense", 1.0),
    "element-5": ("element", 0.05),
    "channel-5": ("channel", 0.05),
    "channel-25": ("channel", 0.25),
    "nonzero": ("nonzero", 1.0),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--epochs", type=int, nargs="+", default=[6])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--norm-after", choices=("pool", "conv"), default="pool")
    parser.add_argument("--out", type=Path, default=Path("mnist-table.jsonl"))
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    asked = [(seed, rate, name) for seed in seeds for rate in args.rates for name in args.rows]
    for seed, rate, name in asked:
        of = {"row": name, "seed": seed, "rate": rate, "norm after": args.norm_after}
        known = [len(run["accuracies"]) for run in load(args) if of.items() <= run.items()]
        if max(known, default=0) >= max(args.epochs):
            continue
        print(f"seed {seed}, {name}, learning rate {rate:g}", flush=True)
        select, keep = ROWS[name]
        accuracies, times, report = train(
            args.data, select, keep, max(args.epochs), seed, args.norm_after, lr=rate, quiet=True
        )
        totals = report.totals
        shares = {"sparse": totals.sparse / totals.dense, "executed": totals.executed / totals.dense}
        run = {**of, "accuracies": accuracies, "times": times, **shares}
        Runs(args.out).add(run)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    headers = ("gradient", "epochs", "learning rate", "accuracy, %", "mean", "sparse FLOPs")
    headers += ("executed FLOPs", "backward speed", "whole step speed")
    runs = load(args)
    rows = [row for epochs in args.epochs for row in table(runs, epochs)]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def load(args):
    """The runs in the file, of this model; of two that are alike the one that came later."""
    runs = [run for run in Runs(args.out).runs if run["norm after"] == args.norm_after]
    return list({(run["row"], run["seed"], run["rate"]): run for run in runs}.values())


def table(runs, epochs):
    """A line for each kind of gradient: with the learning rate that is best after so many epochs."""
    found = {}
    for run in runs:
        if len(run["accuracies"]) >= epochs:
            found.setdefault(run["row"], {}).setdefault(run["rate"], []).append(run)
    best = {name: max(rates.values(), key=lambda of: mean(of, epochs)) for name, rates in found.items()}
    for name, of in best.items():
        select, keep = ROWS[name]
        accuracies = [run["accuracies"][epochs - 1] for run in sorted(of, key=lambda run: run["seed"])]
        yield [
            select if keep == 1 else f"{select} {100 * keep:g} %",
            str(epochs),
            f"{of[0]['rate']:g}",
            " / ".join(f"{accuracy:.2f}" for accuracy in accuracies),
            f"{mean(of, epochs):.2f}",
            *(f"{100 * of[0][share]:.1f} %" for share in ("sparse", "executed")),
            *(f"{speed:.2f}x" for speed in speeds(of, best.get("dense", of))),
        ]


def mean(runs, epochs):
    """The mean accuracy after so many epochs."""
    return statistics.mean(run["accuracies"][epochs - 1] for run in runs)


def speeds(runs, dense):
    """How many times as fast as dense the backward and the whole step are, medians of epochs."""
    for part in (0, 1):
        seconds = [[times[part] for run in of for times in run["times"]] for of in (dense, runs)]
        yield statistics.median(seconds[0]) / statistics.median(seconds[1])


if __name__ == "__main__":
    main()
