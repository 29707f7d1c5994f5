"""Accuracy, backward time and FLOPs of the MNIST example, by what is kept of the gradients.

python examples/benchmarks/mnist_table.py --data data --seeds 5 --epochs 20 --rates 3e-4 1e-3 3e-3

Every row trains once per seed and learning rate; rows take turns within a seed, so that a slow minute hits
all of them. With several rates each row has those of its best mean accuracy.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from mnist_cnn import train

ROWS = (("dense", 1.0), ("element", 0.05), ("channel", 0.05), ("channel", 0.25), ("nonzero", 1.0))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    args = parser.parse_args()
    results = {row: {rate: [] for rate in args.rates} for row in ROWS}
    for seed in range(args.seeds):
        for rate in args.rates:
            for select, keep in ROWS:
                print(f"seed {seed}, {select} {keep:g}, learning rate {rate:g}", flush=True)
                result = train(args.data, select, keep, args.epochs, seed, lr=rate, quiet=True)
                results[select, keep][rate].append(result)
    best = {
        of: max(rates, key=lambda rate, rates=rates: mean_accuracy(rates[rate]))
        for of, rates in results.items()
    }
    dense = results[ROWS[0]][best[ROWS[0]]]
    table = [(*row(*of, results[of][rate], dense), f"{rate:g}") for of, rate in best.items()]
    headers = ("gradient", f"accuracy after {args.epochs} epochs, %", "mean", "sparse FLOPs")
    headers += ("executed FLOPs", "backward speed", "whole step speed", "learning rate")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


def mean_accuracy(runs):
    return statistics.mean(accuracy for accuracy, _, _ in runs)


def row(select, keep, runs, dense_runs):
    totals = runs[0][2].totals
    accuracies = [accuracy for accuracy, _, _ in runs]
    speeds = []
    for part in (0, 1):  # backward, whole step
        seconds = [[times[part] for _, epochs, _ in of for times in epochs] for of in (dense_runs, runs)]
        speeds.append(statistics.median(seconds[0]) / statistics.median(seconds[1]))
    return [
        select if keep == 1 else f"{select} {100 * keep:g} %",
        " / ".join(f"{accuracy:.2f}" for accuracy in accuracies),
        f"{mean_accuracy(runs):.2f}",
        f"{100 * totals.sparse / totals.dense:.1f} %",
        f"{100 * totals.executed / totals.dense:.1f} %",
        *(f"{speed:.2f}x" for speed in speeds),
    ]


if __name__ == "__main__":
    main()
