"""Measures the numbers of this machine that the cost model counts with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprop.policy.machine import Machine, remember, this_machine
from fxprop.policy.step_time import BETWEEN_BACKWARD, BETWEEN_FORWARD
from fxprop.progress import count
from fxprop.timing.layer_times import time_interleaved

# a linear layer whose backward is the unit: rows, in_features, out_features
_PRODUCT = (1576, 768, 3072)
# the same, and features that are kept: few enough for memory to be what it waits for
_FEW = (1576, 3072, 768, 38)
# batch norm with ReLU, between large layers and between small ones
_BETWEEN = ((8, 64, 112, 112), (8, 256, 56, 56))
# convolutions of networks for images, 8 of them: in_channels, out_channels, size, kernel, groups
_CONVOLUTIONS = {
    "convolution": ((64, 64, 56, 3, 1), (256, 256, 14, 3, 1)),
    "pointwise": ((256, 64, 56, 1, 1), (512, 128, 28, 1, 1), (1024, 256, 14, 1, 1)),
    "depthwise": ((64, 64, 112, 3, 64), (96, 96, 56, 7, 96), (240, 240, 28, 5, 240)),
}


def calibrate(*, rounds: int = 5, save: bool = True, progress: bool = False) -> Machine:
    """Measure how fast this CPU is at the parts of a backward, for predictions and `when="faster"`.

    >>> fxprop.calibrate()  # some seconds, once a machine
    >>> print(fxprop.estimate(model, 0.05, (x,)))  # "... predicted for AMD EPYC ..., 2 threads"

    Args:
        rounds: timings of each part, of which the medians are taken.
        save: write the numbers for later processes, into `machines.json` in the folder `fxprop` of the
            user's cache, or into the file that FXPROP_MACHINE in the environment names (nowhere if empty).
        progress: show a progress bar on standard error.

    Float32 on the CPU, with as many threads as torch has now: reports made with another number of threads
    go by what was measured with these, or by the usual numbers. Each is a time, in that of one FLOP of a
    large product of matrices. Returns them.
    """
    parts = 2 + len(_BETWEEN) + sum(map(len, _CONVOLUTIONS.values()))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        bar = iter(count(range(parts), "calibrating", progress, "part"))

        def seconds(call: Callable[[], Any]) -> float:
            next(bar)
            return time_interleaved([call], rounds, torch.device("cpu"))[0]

        flop = _product(seconds)
        moves = [_few(seconds, flop), *(_between(seconds, shape) for shape in _BETWEEN)]
        entry = statistics.geometric_mean(moves) / flop
        work = {
            kind: statistics.geometric_mean(_convolution(seconds, of, flop, entry) for of in convolutions)
            for kind, convolutions in _CONVOLUTIONS.items()
        }
        # the bar's end
        next(bar, None)
    measured = Machine(this_machine(), entry, **work)
    if save:
        remember(measured)
    return measured


_Seconds = Callable[[Callable[[], Any]], float]


def _product(seconds: _Seconds) -> float:
    """Seconds of one FLOP of a large product."""
    rows, n_in, n_out = _PRODUCT
    input, weight, grad = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(rows, n_out)
    return seconds(lambda: (grad @ weight, grad.t() @ input)) / (4 * rows * n_in * n_out)


def _few(seconds: _Seconds, flop: float) -> float:
    """Seconds of an entry, by the sparse backward of a linear layer."""
    rows, n_in, n_out, k = _FEW
    input, weight, grad = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(rows, n_out)
    kept = torch.linspace(0, n_out - 1, k).long()

    def backward() -> tuple[Tensor, Tensor]:
        taken = grad.index_select(1, kept)
        return taken @ weight.index_select(0, kept), taken.t() @ input

    taken, computed = seconds(backward), flop * 4 * rows * n_in * k
    moved = 2 * input.numel() + 4 * k * (rows + n_in)
    return max(taken - computed, taken / 4) / moved


def _between(seconds: _Seconds, shape: Sequence[int]) -> float:
    """Seconds of an entry, by what lies between two layers."""
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    norm = torch.nn.BatchNorm2d(shape[1])
    leaves: list[Tensor] = [x, *norm.parameters()]
    taken = seconds(lambda: torch.autograd.grad(F.relu(norm(x)), leaves, grad))
    return taken / (x.numel() * (BETWEEN_FORWARD + BETWEEN_BACKWARD))


def _convolution(seconds: _Seconds, of: Sequence[int], flop: float, entry: float) -> float:
    """What a FLOP of its backward takes, in those of a product."""
    n_in, n_out, size, kernel, groups = of
    input, grad = torch.randn(8, n_in, size, size), torch.randn(8, n_out, size, size)
    weight = torch.randn(n_out, n_in // groups, kernel, kernel)
    padding = [kernel // 2] * 2
    arguments = (None, [1, 1], padding, [1, 1], False, [0, 0], groups, [True, True, False])
    backward = torch.ops.aten.convolution_backward
    taken = seconds(lambda: backward(grad, input, weight, *arguments)) / flop
    moved = 2 * entry * (input.numel() + weight.numel() + grad.numel())
    flops = 4 * grad.numel() * weight[0].numel()
    # memory may be faster here than where it was measured
    return float(max(taken - moved, taken / 4) / flops)
