"""The backward of single layers with element selection against the dense one, in one run, on the CPU.

python examples/benchmarks/element_layers.py --threads 2 --rounds 21

Selection included. In every round both are timed once, the dense one first; the ratio is that of the
medians, and the quartiles are those of the rounds' ratios. What the cost model expects stands beside it.
With --alone the loops run also where masking is expected to be faster. All numbers are drawn at random.
"""

import argparse
import functools
import os
import statistics
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate

from fxprop import ops
from fxprop.ops.axes import Shapes, of_convolution, of_linear

# rows, output features, input features
LINEAR = ((1576, 3072, 768), (1576, 768, 3072), (64, 1024, 3136))
# examples, input and output channels, size of the image, of the kernel
CONV = (
    (64, 32, 64, 14, 5),
    (8, 64, 64, 56, 3),
    (8, 256, 256, 14, 3),
    (8, 512, 512, 7, 3),
    (8, 64, 256, 56, 1),
)


def layers(keeps):
    """(name, kept share, shapes of input and weight, dense and sparse operator, axes, k)."""
    for rows, outs, ins in LINEAR:
        for keep in keeps:
            k = round(keep * outs)
            sparse = functools.partial(ops.linear, k=k, select="element")
            axes = of_linear(Shapes((rows, ins), (outs, ins), (rows, outs)))
            yield f"linear {rows}x{outs}x{ins}", keep, (rows, ins), (outs, ins), F.linear, sparse, axes, k
    for count, ins, outs, size, kernel in CONV:
        for keep in keeps:
            k, pad = round(keep * outs * size**2), {"padding": kernel // 2}
            dense = functools.partial(F.conv2d, **pad)
            sparse = functools.partial(ops.conv2d, **pad, k=k, select="element")
            shapes = (count, ins, size, size), (outs, ins, kernel, kernel)
            axes = of_convolution(Shapes(*shapes, (count, outs, size, size)))
            name = f"conv {kernel}x{kernel} {ins}->{outs}, {count} of {size}x{size}"
            yield name, keep, *shapes, dense, sparse, axes, k


def measure(calls, rounds):
    """Seconds of each call in each round; with one thread those that the process computed in."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found = []
    for _ in range(rounds + 2):
        times = []
        for call in calls:
            start = clock()
            call()
            times.append(clock() - start)
        found.append(times)
    return list(zip(*found[2:], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        os.environ["FXPROP_SPARSE"] = "always"
    table = []
    for name, keep, input, weight, dense, sparse, axes, k in layers(args.keep):
        x, w = torch.randn(input, requires_grad=True), torch.randn(weight, requires_grad=True)
        outputs = [dense(x, w), sparse(x, w)]
        grad = torch.randn_like(outputs[0])
        calls = [
            functools.partial(torch.autograd.grad, y, (x, w), grad, retain_graph=True) for y in outputs
        ]
        times = measure(calls, args.rounds)
        medians = [statistics.median(of) for of in times]
        low, _, high = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4)
        expected = axes.alone.speedup(k, 2, axes.examples)
        ratios = f"{medians[0] / medians[1]:.2f}x", f"{low:.2f} to {high:.2f}", f"{expected:.2f}x"
        table.append((name, f"{100 * keep:g} %", *(f"{1e3 * of:.2f}" for of in medians), *ratios))
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds")
    headers = ("layer", "kept", "dense, ms", "sparse, ms", "ratio", "quartiles", "expected")
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
