"""What the report says about layers and totals, in the same words in every form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fxprop.ops.entries import available
from fxprop.ops.selections import SELECTIONS
from fxprop.policy.machine import USUAL
from fxprop.report import learning
from fxprop.report.by_module import Column, Row
from fxprop.report.records import Layer, ReportData
from fxprop.report.units import percent, scaled

COLUMNS: tuple[Column, ...] = ("dense", "sparse", "executed")


def title(report: ReportData) -> str:
    """How many layers of each kind there are."""
    counts = {"rewritten": 0, "dense": 0, "skipped": 0}
    for layer in report.layers:
        counts[layer.status] += 1
    return (
        f"{report.model}: {counts['rewritten']} layers rewritten, {counts['dense']} dense, "
        f"{counts['skipped']} skipped ({report.frontend} front-end, {report.mode} mode)"
    )


def notes(report: ReportData) -> list[str]:
    """What the numbers mean, and what else there is to know about them."""
    totals = report.totals
    if totals.other is None:
        lines = ["FLOPs were not counted: they need example_inputs."]
    else:
        lines = [
            f"{report.unit} of one backward pass; one multiply-add = 2 FLOPs. sparse: what the kept "
            "entries need. executed: what the kernels perform. other: products outside the listed layers, "
            "and skipped layers.",
            f"Forward of the listed layers: {report.unit.text(totals.forward)} {report.unit}. Scoring and "
            f"top-k: {scaled(totals.select_ops)} element operations.",
        ]
    lines += [line for line in (on_the_clock(report), learning.of_settings(report)) if line]
    lines += _by_entries(report)
    if row_sparse := sum(layer.weight_grad == "row_sparse" for layer in report.layers):
        lines.append(f"Layers with a row-sparse weight gradient: {row_sparse}.")
    if apart := sum(layer.k_input != layer.k_weight for layer in report.layers):
        lines.append(f"Layers with a share for each gradient, kept for grad_input + grad_weight: {apart}.")
    if cut := sum(not layer.reached for layer in report.layers):
        lines.append(
            f"No gradient arrives at {cut} layers (none): what lies behind them keeps nothing for "
            "grad_input. In other it is counted all the same."
        )
    if chained := sum(layer.chain is not None for layer in report.layers):
        lines.append(
            f"Chains: {chained} layers compute their input's gradient only in the channels that the layer "
            "in front of them reads."
        )
    lines += [describe_examples(report)] if report.examples else []
    left_out = Counter(why for layer in report.layers for why in layer.left_out)
    lines += [f"Ignored at {count} layers: {why}." for why, count in left_out.items()]
    return [*lines, *([report.note] if report.note else [])]


def on_the_clock(report: ReportData) -> str:
    """What the FLOPs saved should come to in time; empty where that is not known."""
    clock = report.clock
    if clock is None:
        unknown = (
            "FLOPs are not time. Layers this small are not predicted on the clock; fxprop bench measures."
        )
        return unknown if report.totals.saving else ""
    basis = f"predicted for {clock.machine}, with SGD; fxprop bench measures"
    if clock.machine == USUAL.name:
        yours = "fxprop calibrate makes it yours, fxprop bench measures"
        basis = f"predicted for a {USUAL.name}, with SGD; {yours}"
    if clock.layers_measured:
        basis = (
            f"{clock.layers_measured} layers timed on {clock.machine}, the rest of the model predicted; "
            "fxprop bench measures all of it"
        )
    return (
        f"FLOPs are not time. On the clock: backward {clock.backward:.1f}x, whole step {clock.step:.1f}x "
        f"as fast as dense ({basis})."
    )


def _by_entries(report: ReportData) -> list[str]:
    """How layers that keep single entries are computed."""
    selected = [(layer, SELECTIONS[layer.select]) for layer in report.layers if layer.select]
    entries = [layer for layer, of in selected if not (of.of_slices or of.exact)]
    alone = [x for x in entries if x.executed is not None and x.executed != x.dense]
    selects = ", ".join(sorted({repr(layer.select) for layer in entries}))
    lines = []
    if exact := sum(of.exact for _, of in selected):
        lines.append(
            f"select='nonzero' at {exact} layers: the gradients are the dense ones; how many entries are "
            "zero, and with it what is executed, is known at each backward alone."
        )
    if alone:
        lines.append(
            f"select={selects}: {len(alone)} layers compute with the kept entries alone, by compiled loops "
            "(numba) on the CPU."
        )
    if len(alone) < len(entries):
        why = available.why_not()
        of = f" at {len(entries) - len(alone)} layers" if alone else ""
        lines.append(
            f"select={selects} masks the gradient{of} and runs the dense kernels: executed equals dense, "
            f"and no time is saved{f' ({why})' if why else ''}."
        )
    return lines


def describe_examples(report: ReportData) -> str:
    """What part of the mini-batch enters the backward."""
    kept = report.examples
    assert kept is not None
    if kept.off:
        return f"examples={kept.share!r} is off, and all examples enter the backward: {kept.off}."
    chosen = f"examples_select={kept.select!r}"
    if kept.share == "auto":
        least = "" if kept.k is None else f", between {kept.k} of {kept.n} and all"
        whole = report.totals
        if kept.k is None or kept.n is None or whole.other is None or whole.executed is None:
            return f"examples='auto' ({chosen}){least}: how many is decided as training goes on."
        dense = (whole.dense or 0) + whole.other
        most = 1 - (whole.executed + whole.other) * kept.k / kept.n / dense if dense else 0.0
        return (
            f"examples='auto' ({chosen}){least}: the numbers are for all of them, which is how training "
            f"begins; with the fewest {percent(most)} would be saved. What part is kept depends on how "
            "different the examples' gradients are."
        )
    if kept.n is None:
        return f"examples={kept.share!r} ({chosen}): their share of the FLOPs was not counted."
    return (
        f"Of the {kept.n} examples {kept.k} enter the backward ({chosen}): a factor on everything that is "
        "executed, other included; the gradients of all arrive at the outputs, or the loss."
    )


def reasons(report: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    """What is not rewritten, and why, under a heading for each kind there is."""
    dense = [(x.name, str(x.reason)) for x in report.layers if x.status == "dense"]
    skipped = [(f"{x.name} ({x.op})", str(x.reason)) for x in report.layers if x.status == "skipped"]
    untraced = [(name or report.model, reason) for name, reason in report.untraced]
    parts = [("left dense", dense), ("skipped", skipped), ("runs as written", untraced)]
    return [(heading, lines) for heading, lines in parts if lines]


def kept(row: Row) -> str:
    """What is kept: "13/256 channel" of a layer, "4 layers" or "3 of 4 layers" of a module."""
    if row.layer is not None:
        return kept_of(row.layer)
    rewritten = sum(layer.status == "rewritten" for layer in row.layers)
    whole = len(row.layers)
    return f"{whole} layers" if rewritten == whole else f"{rewritten} of {whole} layers"


def kept_of(layer: Layer) -> str:
    """ "13/256 channel", "13+26/256 channel" for grad_input and grad_weight; "all" of a dense layer."""
    if not layer.reached:
        return "none"
    if layer.status != "rewritten":
        return "all"
    kept = layer.k if layer.k_input == layer.k_weight else f"{layer.k_input}+{layer.k_weight}"
    return f"{kept}/{layer.n} {layer.select}"


def remarks(layer: Layer) -> str:
    """What is rewritten with the layer, and what other layers have to do with it."""
    return ", ".join(
        [
            *([f"with {layer.region}"] if layer.region else []),
            *([f"for {layer.chain}"] if layer.chain else []),
            *(["row-sparse weight gradient"] if layer.weight_grad == "row_sparse" else []),
        ]
    )


def shape(sizes: Sequence[int] | None) -> str:
    """ "64x3x7x7"; "-" where unknown."""
    return "-" if sizes is None else "x".join(map(str, sizes))


def ops(row: Row) -> str:
    """ "conv2d" of a layer, "3 conv2d, 1 linear" of a module."""
    if row.layer is not None:
        return row.layer.op
    counts = Counter(layer.op for layer in row.layers)
    return ", ".join(f"{count} {op}" for op, count in counts.items())


def total_lines(report: ReportData) -> list[tuple[str, list[int]]]:
    """The sums under the columns: name, and dense, sparse and executed; none without example inputs."""
    totals = report.totals
    if totals.other is None:
        return []
    sums = [getattr(totals, column) for column in COLUMNS]
    kept = totals.other if totals.other_executed is None else totals.other_executed
    other = [totals.other, kept, kept]
    whole = [count + rest for count, rest in zip(sums, other, strict=True)]
    return [("listed layers", sums), ("other", other), ("whole backward", whole)]
