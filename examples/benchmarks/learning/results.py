"""Finished runs: kept as lines of JSON, compared in pairs, shown as a table and as a plot."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

Run = dict[str, Any]
# what tells one run from another
KEY = ("task", "method", "budget", "clock", "threads", "lr", "batch", "seed", "grid")


def key_of(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in KEY)


class Runs:
    """The runs in a file; a line is added when a run is finished, so what is interrupted can go on."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # a process that was killed while it wrote leaves part of a line
        whole = [line for line in lines if line.endswith("}")]
        self.runs: list[Run] = [json.loads(line) for line in whole]
        self._torn = len(whole) < len(lines)

    def find(self, key: Run) -> Run | None:
        wanted = key_of(key)
        return next((run for run in self.runs if key_of(run) == wanted), None)

    def add(self, run: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn + json.dumps(run) + "\n")
        self._torn = False
        self.runs.append(run)

    def best(self, wanted: Run) -> tuple[float, int] | None:
        """Learning rate and batch size of the least validation loss among the runs of a grid."""
        names = [name for name in KEY if name not in ("lr", "batch", "seed")]
        grid = [r for r in self.runs if r["grid"] and all(r[n] == wanted[n] for n in names if n != "grid")]
        losses: dict[tuple[float, int], list[float]] = {}
        for run in grid:
            losses.setdefault((run["lr"], run["batch"]), []).append(finite(run["validation"][0]))
        return min(losses, key=lambda of: statistics.mean(losses[of])) if losses else None


def finite(loss: float) -> float:
    """A run that diverged is worse than any other."""
    return loss if math.isfinite(loss) else 1e9


def student_below(t: float, degrees: int) -> float:
    """Distribution function of Student's t, by Simpson's rule on its density."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(
        degrees * math.pi
    )
    # x = tan(u) / sqrt(degrees): the density becomes a power of the cosine
    end, parts = math.atan(t / math.sqrt(degrees)), 2000
    width = end / parts
    values = [math.cos(i * width) ** (degrees - 1) for i in range(parts + 1)]
    area = width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
    return 0.5 + scale * math.sqrt(degrees) * area


def student_quantile(probability: float, degrees: int) -> float:
    """The t below which a share of the distribution lies; above one half."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_below(middle, degrees) < probability else (low, middle)
    return low


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the differences, half width of its 95 % interval, and the two-sided p value by a t test."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.inf, math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    degrees = len(differences) - 1
    if error == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0
    p = 2 * (1 - student_below(abs(mean) / error, degrees))
    return mean, student_quantile(0.975, degrees) * error, p


def time_to(run: Run, loss: float) -> float | None:
    """Share of the budget after which the curve of the test loss is at `loss` or below, for good or not."""
    before: tuple[float, float] | None = None
    for spent, _, reached, _ in run["curve"]:
        at = spent / run["budget"]
        if reached <= loss:
            if before is None or before[1] <= loss:
                return at
            return before[0] + (at - before[0]) * (before[1] - loss) / (before[1] - reached)
        before = at, reached
    return None


def table(runs: Iterable[Run], markdown: bool = True) -> str:
    """One row for each method and budget; differences are to dense of the same seeds."""
    groups: dict[tuple[Any, ...], dict[int, Run]] = {}
    for run in runs:
        if not run["grid"]:
            groups.setdefault((run["task"], run["budget"], run["method"]), {})[run["seed"]] = run
    rows = [
        _row(*of, groups) for of in sorted(groups, key=lambda of: (of[0], of[1], of[2] != "dense", of[2]))
    ]
    headers = ("task", "budget, s", "method", "lr", "batch", "seeds", "steps", "kept", "test loss")
    headers += ("- dense (95 %)", "p", "accuracy, %", "- dense (95 %)", "time to dense's loss")
    return tabulate(rows, headers, tablefmt="github" if markdown else "simple", disable_numparse=True)


def _row(task: str, budget: float, name: str, groups: dict[tuple[Any, ...], dict[int, Run]]) -> list[str]:
    of = groups[task, budget, name]
    dense = groups.get((task, budget, "dense"), {})
    seeds = sorted(of.keys() & dense.keys()) if name != "dense" else []
    any_run = next(iter(of.values()))
    # a run of very few steps has fewer quarters than four
    quarters = min(len(r["kept"]) for r in of.values())
    kept = " ".join(f"{statistics.mean(r['kept'][q] for r in of.values()):.2f}" for q in range(quarters))
    losses, accuracies = ([r["test"][i] for r in of.values()] for i in (0, 1))
    compared = ["", "", "", ""]
    if seeds:
        loss = paired(*([g[s]["test"][0] for s in seeds] for g in (of, dense)))
        accuracy = paired(*([g[s]["test"][1] for s in seeds] for g in (of, dense)))
        times = [time_to(of[s], dense[s]["curve"][-1][2]) for s in seeds]
        middle = statistics.median(math.inf if t is None else t for t in times)
        compared = [
            f"{loss[0]:+.4f} ± {loss[1]:.4f}",
            f"{loss[2]:.2g}",
            f"{accuracy[0]:+.2f} ± {accuracy[1]:.2f}",
            f"{middle:.2f}" if math.isfinite(middle) else "not reached",
        ]
    return [
        task,
        f"{budget:g}",
        f"{name} ({any_run['remark']})" if any_run["remark"] else name,
        f"{any_run['lr']:g}",
        str(any_run["batch"]),
        str(len(of)),
        f"{statistics.mean(r['steps'] for r in of.values()):.0f}",
        "" if kept == "1.00 1.00 1.00 1.00" else kept,
        f"{statistics.mean(losses):.4f}",
        *compared[:2],
        f"{statistics.mean(accuracies):.2f}",
        *compared[2:],
    ]


def plot(runs: Iterable[Run], file: Path) -> None:
    """Test loss over time, its mean over the seeds with a band of one deviation; a panel for each task."""
    from matplotlib.figure import Figure

    lines: dict[str, dict[tuple[str, float], list[Run]]] = {}
    for run in runs:
        if not run["grid"] and run["curve"]:
            lines.setdefault(run["task"], {}).setdefault((run["method"], run["budget"]), []).append(run)
    figure = Figure((6 * max(len(lines), 1), 4.5), layout="constrained")
    panels = figure.subplots(1, max(len(lines), 1), squeeze=False)[0]
    for panel, (task, of) in zip(panels, lines.items(), strict=False):
        names = list(dict.fromkeys(name for name, _ in of))
        for (name, budget), group in of.items():
            colour = f"C{names.index(name) % 10}"
            points = list(zip(*(run["curve"] for run in group), strict=False))
            spent = [statistics.mean(p[0] for p in at) for at in points]
            mean = [statistics.mean(p[2] for p in at) for at in points]
            band = [statistics.stdev(p[2] for p in at) if len(at) > 1 else 0.0 for at in points]
            label = name if budget == max(b for n, b in of if n == name) else None
            panel.plot(spent, mean, color=colour, marker=".", label=label)
            panel.fill_between(
                spent,
                [m - b for m, b in zip(mean, band, strict=True)],
                [m + b for m, b in zip(mean, band, strict=True)],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        panel.set(title=task, xlabel="seconds of training", ylabel="test loss", yscale="log")
        panel.legend(fontsize="small")
    figure.savefig(file)
