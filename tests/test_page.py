"""The report as a page, a notebook view and a picture: the report's own numbers, escaped, and fit to be read."""

import dataclasses
import html.parser
import re
import sys

import pytest
import torch
from models import MARKUP, transformed, with_names_that_are_markup
from torch import nn

import fxprop
from fxprop.cli import main as cli
from fxprop.errors import ReportError
from fxprop.report.forms import picture as plot


class Page(html.parser.HTMLParser):
    """Tables as rows of (text, data-value), and every tag and address."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.links, self._cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [value for key, value in attrs.items() if key in ("src", "href")]
        if tag == "table":
            self.tables.append((attrs.get("class"), []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag == "td":
            self._cell = ["", attrs.get("data-value")]
            self.tables[-1][1][-1].append(self._cell)

    def handle_endtag(self, tag):
        if tag == "td":
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[0] += data

    def rows(self, table):
        return [row for name, rows in self.tables if name and table in name.split() for row in rows if row]


# --- one report behind everything -------------------------------------------------------------------------


def assert_shows(page, report):
    """Every number of the layers on a page is the report's."""
    rows = page.rows("layers")
    layers = [layer for layer in report.layers if layer.status != "skipped"]
    assert [row[1][0] for row in rows] == [layer.name for layer in layers]
    for row, layer in zip(rows, layers, strict=True):
        exact = [getattr(layer, column).total for column in ("dense", "sparse", "executed")]
        exact.append(exact[0] - exact[2])
        assert [int(value) for _, value in row[4:8]] == exact
        assert [text for text, _ in row[4:8]] == [report.unit.text(count) for count in exact]


def test_the_page_shows_the_reports_numbers(resnet):
    gm, report = resnet
    text = report.to_html(fxprop.code_diff(gm))
    page = Page(text)
    assert_shows(page, report)
    assert_shows(Page(report._repr_html_()), report)
    totals = report.totals
    sums = [totals.dense, totals.sparse, totals.executed]
    lines = {row[0][0]: [int(value) for _, value in row[1:]] for row in page.rows("totals")}
    assert lines == {
        "listed layers": sums,
        "other": [totals.other] * 3,
        "whole backward": [count + totals.other for count in sums],
    }
    assert f"{100 * totals.saving:.1f} % of the backward" in text


def test_the_comparison_can_fail(resnet):
    report = resnet.report
    exact = report.layers[3].executed.total
    wrong = report.to_html().replace(f'data-value="{exact}"', f'data-value="{exact + 1}"')
    with pytest.raises(AssertionError):
        assert_shows(Page(wrong), report)


def test_the_picture_shows_the_reports_numbers(resnet):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    report = resnet.report
    drawn = plot.figure(report).axes[0]
    for container, column in zip(drawn.containers, ("dense", "executed"), strict=True):
        heights = [bar.get_height() * report.unit.size for bar in container]
        assert heights == pytest.approx([getattr(layer, column).total for layer in report.layers])


def test_the_text_shows_the_reports_numbers(resnet):
    report = resnet.report
    text = report.to_text(width=200, depth="all")
    for layer in report.layers:
        counts = [report.unit.text(getattr(layer, c).total) for c in ("dense", "sparse", "executed")]
        assert re.search(rf"{re.escape(layer.name)} .* {' +'.join(map(re.escape, counts))} ", text), (
            layer.name
        )


def test_what_saves_most_is_said_first(resnet):
    report = resnet.report
    most = max(report.layers, key=lambda layer: layer.dense.total - layer.executed.total)
    facts = report.to_html().partition('class="facts"')[2].partition("</dl>")[0]
    assert "saves most" in facts
    assert most.name in facts.replace("<wbr>", "")


# --- the page itself --------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere(resnet):
    page = Page(resnet.report.to_html(fxprop.code_diff(resnet.module)))
    assert page.links == ["data:,"]
    assert not {"img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("script") == 1


def test_names_are_escaped():
    gm, report = transformed(with_names_that_are_markup(), (2, 4), keep=0.5, when="always")
    report = dataclasses.replace(report, model="<b>Evil", note="<i>note", untraced=(("<u>", "<s>"),))
    for text in (report.to_html(fxprop.code_diff(gm)), report._repr_html_()):
        assert MARKUP not in text
        assert "<img" not in text
        assert not {"b", "u", "s"} & set(Page(text).tags)
        assert "&lt;script&gt;alert(1)" in text


def test_reasons_policy_and_diff_are_there():
    rules = [fxprop.Rule(name="0", keep=0.5)]
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.ConvTranspose1d(8, 8, 2), nn.Linear(9, 2))

    gm, report = fxprop.transform(
        model, fxprop.Policy(keep=0.25, rules=rules), (torch.ones(2, 8, 4),), leaf_modules=["2"]
    )
    text = report.to_html(fxprop.code_diff(gm))
    assert "kept as one call because of leaf_modules" in text
    assert "output layer" in text
    assert "{ name = &#34;0&#34;, keep = 0.5 }" in text
    assert "rule 1 (name=&#39;0&#39;)" in text
    assert 'class="fxprop-diff"' in text
    assert "fxprop-diff" not in report.to_html()


def test_without_numbers():
    report = fxprop.transform(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 0.25).report
    assert "FLOPs were not counted" in report.to_html()
    assert "2/8 channel" in report._repr_html_()
    with pytest.raises(ReportError, match="nothing to draw"):
        report.plot("x.svg")
    empty = fxprop.estimate(nn.Sequential(nn.ReLU()), 0.5, (torch.ones(2, requires_grad=True),))
    assert "No layer was found" in empty.to_html()


# --- the command line -------------------------------------------------------------------------------------

MODEL = ["tests.test_inspect:net", "--input", "4x3x8x8", "--keep", "0.25"]


def test_report_as_a_page(capsys, tmp_path):
    file = tmp_path / "report.html"
    assert cli.main(["report", *MODEL, "--format", "html", "-o", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert 'class="fxprop-diff"' in text
    assert cli.main(["report", *MODEL, "--format", "html", "-o", "-"]) == 0
    assert capsys.readouterr().out == text


def test_plot_command(capsysbinary, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    starts = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    for ending, start in starts.items():
        file = tmp_path / f"savings.{ending}"
        assert cli.main(["plot", *MODEL, "-o", str(file)]) == 0
        assert file.read_bytes().startswith(start)
        assert cli.main(["plot", *MODEL, "--format", ending]) == 0
        assert capsysbinary.readouterr().out.startswith(start)
    assert cli.main(["plot", *MODEL, "-o", str(tmp_path / "savings.txt")]) == 1
    assert b"expected a name that ends in svg, png, pdf, or --format" in capsysbinary.readouterr().err


def test_a_picture_is_not_thrown_at_a_terminal(capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["plot", *MODEL, "--format", "png"]) == 1
    assert "cannot be shown on a terminal" in capsys.readouterr().err


def test_without_matplotlib(resnet, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ReportError, match=r"pip install 'fxprop\[plot\]'"):
        resnet.report.plot(tmp_path / "x.svg")


def test_a_picture_that_cannot_be_written(resnet, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    for file, why in ((tmp_path / "no" / "x.svg", "No such file"), (tmp_path / "x.abc", "abc")):
        with pytest.raises(ReportError, match=f"cannot write the picture to .*{why}"):
            resnet.report.plot(file)
