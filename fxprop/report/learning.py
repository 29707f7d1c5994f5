"""What settings did to learning in our measurements, in a line each; the guide has tables and commands."""

from __future__ import annotations

from fxprop.report.records import ReportData

GUIDE = "examples/guide/choosing.md"

_SAID = {
    "channel": (
        "on 8,000 MNIST digits a CNN lost nothing with 25 % of the channels (98.0 against 97.9 % dense), "
        "and one point with 5 % (97.0)"
    ),
    "element": (
        "on 8,000 MNIST digits a CNN lost 0.6 points with 5 % of the entries (97.3 against 97.9 % dense)"
    ),
    "nonzero": "select='nonzero' drops nothing, so that the dense model's is to be expected",
}
_OTHERS = "what this setting does to learning was not measured"


def of_settings(report: ReportData) -> str:
    """One line for the selections that the report's layers use; empty where nothing is left out."""
    used = dict.fromkeys(layer.select for layer in report.layers if layer.select is not None)
    takes_part = report.examples is not None and not report.examples.off
    if not used and not takes_part:
        return ""
    apart = any(layer.k_input != layer.k_weight for layer in report.layers)
    measured = [] if apart else [_SAID.get(select, _OTHERS) for select in used]
    said = list(dict.fromkeys(measured)) or [_OTHERS]
    return f"Learning: {'; '.join(said)}. Harder tasks may lose more; see {GUIDE}."
