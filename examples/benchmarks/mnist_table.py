"""Accuracy, backward time and FLOPs of the MNIST example: dense, element 5 %, channel 5 %, channel 25 %.

python examples/benchmarks/mnist_table.py --data data --seeds 3

Every row trains once per seed; rows take turns within a seed, so that a slow minute hits all of them.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from mnist_cnn import train

ROWS = (("dense", 1.0), ("element", 0.05), ("channel", 0.05), ("channel", 0.25))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results = {row: [] for row in ROWS}
    for seed in range(args.seeds):
        for select, keep in ROWS:
            print(f"seed {seed}, {select} {keep:g}", flush=True)
            result = train(args.data, select, keep, args.epochs, seed, quiet=True)
            results[select, keep].append(result)
    table = [row(select, keep, runs, results[ROWS[0]]) for (select, keep), runs in results.items()]
    headers = ("gradient", f"accuracy after {args.epochs} epochs, %", "mean", "sparse FLOPs")
    headers += ("executed FLOPs", "backward speed", "whole step speed")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


def row(select, keep, runs, dense_runs):
    totals = runs[0][2].totals
    accuracies = [accuracy for accuracy, _, _ in runs]
    speeds = []
    for part in (0, 1):  # backward, whole step
        seconds = [[times[part] for _, epochs, _ in of for times in epochs] for of in (dense_runs, runs)]
        speeds.append(statistics.median(seconds[0]) / statistics.median(seconds[1]))
    return [
        select if select == "dense" else f"{select} {100 * keep:g} %",
        " / ".join(f"{accuracy:.2f}" for accuracy in accuracies),
        f"{statistics.mean(accuracies):.2f}",
        f"{100 * totals.sparse / totals.dense:.1f} %",
        f"{100 * totals.executed / totals.dense:.1f} %",
        *(f"{speed:.2f}x" for speed in speeds),
    ]


if __name__ == "__main__":
    main()
