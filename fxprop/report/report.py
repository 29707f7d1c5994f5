"""The report that users get: the data, with a method for each form."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass

from fxprop.errors import ReportError
from fxprop.report.by_module import Depth
from fxprop.report.forms import csv, picture, text
from fxprop.report.records import ReportData

# of a text that goes to no terminal
WIDTH = 100


@dataclass(frozen=True)
class Report(ReportData):
    """What a policy saves on a model's backward pass.

    >>> gm, report = fxprop.transform(model, 0.05, (x,))
    >>> print(report)
    >>> report.totals.saving, report.to_dict()["totals"]["executed"]

    Counts are FLOPs, one multiply-add = 2, of one backward pass on the example inputs in the given
    mode. `dense` is the ordinary backward, `sparse` the arithmetic that the kept entries need,
    `executed` what fxprop's kernels perform; where element selection masks and runs the dense kernels
    it equals `dense`.
    """

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_csv(self) -> str:
        """One line per layer, exact numbers; columns as in the schema, flattened."""
        return csv.to_csv(self)

    def to_text(self, width: int | None = None, depth: Depth = None) -> str:
        """Tables to read, grouped by module with subtotals; exact numbers are in the other forms.

        >>> print(report.to_text(width=160, depth="all"))

        Args:
            width: of the longest line, at least 80; more room shows more columns. Default: as wide as the
                terminal, or 100 where there is none.
            depth: module levels to show, 1 for the model's own children; "all" for every layer. Default:
                the deepest level at which there are at most half as many rows as layers, and every layer of
                a small model.

        All numbers are in one unit; rows that are no subtotals add up to the totals within their rounding.
        """
        if width is None:
            width = shutil.get_terminal_size((WIDTH, 24)).columns
        return text.to_text(self, width, depth)

    def to_markdown(self, depth: Depth = "all") -> str:
        """`to_text` as Markdown, with all columns."""
        return text.to_markdown(self, depth)

    def to_html(self, code_diff: str = "", backward: str = "") -> str:
        """A page of its own, for a browser: totals, bars, a sortable table, reasons, the policy.

        >>> Path("report.html").write_text(report.to_html(fxprop.code_diff(gm)), encoding="utf-8")

        Nothing is loaded from elsewhere; names are escaped. `code_diff`, and
        `backward` (of a policy with examples), are shown folded. Raises ReportError without jinja2.
        """
        try:
            from fxprop.report.forms import page  # jinja2 is needed here alone
        except ImportError as error:
            raise ReportError("a page needs jinja2, which is not installed: pip install jinja2") from error
        return page.to_page(self, code_diff, backward)

    def _repr_html_(self) -> str | None:
        """What a notebook shows; the text, where there is no jinja2."""
        try:
            from fxprop.report.forms import page
        except ImportError:
            return None
        return page.to_fragment(self)

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the backward FLOPs of every layer, dense and executed, to a .svg, .png or .pdf file.

        >>> report.plot("savings.svg")

        Raises ReportError without matplotlib (the extra `plot`), or without example inputs.
        """
        picture.save(picture.figure(self), file)

    def __str__(self) -> str:
        return self.to_text()
