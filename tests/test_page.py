"""The report as a page, a notebook view and a picture: the report's own numbers, escaped, and fit to be read."""

import dataclasses
import html.parser
import json
import re
import shutil
import sys

import pytest
import torch
import torchvision
from torch import nn

import fxprop
from fxprop.cli import main as cli
from fxprop.errors import ReportError
from fxprop.report.forms import picture as plot

EVIL = "<script>alert(1)</script>"


def transformed(model, shape, keep=0.05, **settings):
    policy = fxprop.Policy(keep=keep, **settings)
    return fxprop.transform(model, policy, (torch.empty(shape, device="meta"),))


@pytest.fixture(scope="module")
def resnet():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    return transformed(model, (8, 3, 224, 224))


def evil():
    """Names that are markup."""
    model = nn.Sequential()
    model.add_module(EVIL, nn.Linear(4, 8))
    model.add_module("<img src=x onerror=alert(1)>", nn.Linear(8, 8))
    model.add_module("out", nn.Linear(8, 2))
    return model


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
    gm, report = transformed(evil(), (2, 4), keep=0.5, when="always")
    report = dataclasses.replace(report, model="<b>Evil", note="<i>note", untraced=(("<u>", "<s>"),))
    for text in (report.to_html(fxprop.code_diff(gm)), report._repr_html_()):
        assert EVIL not in text
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


# --- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


DESKTOP, PHONE = (1280, 900), (360, 740)


def opened(browser, file, size, scheme="light", scripts=True):
    """The page in a window of that size; every folded part unfolded."""
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700},
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(file.as_uri())
    if scripts:
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    return browser


# elements that reach beyond the window and are not inside something that scrolls or hides it
OVERFLOWING = """
const inside = (e) => { for (; e; e = e.parentElement) if (getComputedStyle(e).overflowX !== 'visible') return true; };
return [...document.body.querySelectorAll('*')]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !inside(e.parentElement))
  .map(e => e.outerHTML.slice(0, 80));
"""
# tables that scroll inside their box: what a phone shows should not need it
SCROLLING = (
    "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
)


def overflowing(browser):
    wide, window = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    return browser.execute_script(OVERFLOWING) + ([f"page of {wide}"] if wide > window else [])


def requests(browser):
    """Addresses the page asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    found = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in found if not url.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory, resnet):
    folder = tmp_path_factory.mktemp("pages")
    long = nn.Sequential()
    long.add_module("a_long_name_without_a_place_to_break_it_" * 4, nn.Linear(4, 8))
    long.add_module("out", nn.Linear(8, 2))
    made = {
        "resnet": resnet,
        "evil": transformed(evil(), (2, 4), 0.5),
        "long": transformed(long, (2, 4), 0.5),
    }
    written = {}
    for name, (gm, report) in made.items():
        written[name] = folder / f"{name}.html"
        written[name].write_text(report.to_html(fxprop.code_diff(gm)), encoding="utf-8")
    return written


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["resnet", "evil", "long"])
def test_in_a_browser_nothing_overflows_and_nothing_goes_wrong(browser, files, name, size, scheme):
    page = opened(browser, files[name], size, scheme)
    assert overflowing(page) == []
    assert page.execute_script(SCROLLING) == 0 or name != "resnet"
    assert page.get_log("browser") == []
    assert requests(page) == []
    background, colour = page.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    light = [sum(map(int, re.findall(r"\d+", value)[:3])) for value in (background, colour)]
    assert (light[0] > light[1]) == (scheme == "light")


def test_the_browsers_checks_can_fail(browser, tmp_path):
    file = tmp_path / "bad.html"
    bad = "<body><p style='width: 3000px'>x<script>missing()</script><img src='http://127.0.0.1:9/x.png'>"
    file.write_text(bad, encoding="utf-8")
    page = opened(browser, file, PHONE)
    assert overflowing(page)
    assert page.get_log("browser")
    assert requests(page) == ["http://127.0.0.1:9/x.png"]


def shown(page):
    return page.execute_script(
        "return [...document.querySelectorAll('.layers tbody tr')].map(r => r.cells[1].textContent)"
    )


def test_columns_sort_by_a_click(browser, files, resnet):
    page = opened(browser, files["resnet"], DESKTOP)
    names = [layer.name for layer in resnet.report.layers]
    assert shown(page) == names
    click = "const b = [...document.querySelectorAll('.layers th button')].find(b => b.textContent === arguments[0]);"
    saved = {x.name: x.dense.total - x.executed.total for x in resnet.report.layers}
    page.execute_script(click + "b.click()", f"saved {resnet.report.unit}")
    assert [saved[name] for name in shown(page)] == sorted(saved.values(), reverse=True)
    page.execute_script(click + "b.click()", f"saved {resnet.report.unit}")
    assert [saved[name] for name in shown(page)] == sorted(saved.values())
    page.execute_script(click + "b.click()", "layer")
    assert shown(page) == sorted(names)
    page.execute_script(click + "b.click(); b.click()", "#")
    assert shown(page) == names


def test_without_javascript_everything_but_sorting_is_there(browser, files):
    page = opened(browser, files["resnet"], DESKTOP, scripts=False)
    try:
        from selenium.webdriver.common.by import By

        assert len(page.find_elements(By.CSS_SELECTOR, ".layers tbody tr")) == 21
        assert not page.find_elements(By.CSS_SELECTOR, "th button")
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


# A4 and US letter without their margins, in CSS pixels
PAPER = [(718, 1000), (740, 980)]


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("name", ["resnet", "evil", "long"])
def test_it_fits_on_paper(browser, files, name, size):
    page = opened(browser, files[name], size)
    try:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert overflowing(page) == []
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    pdf = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert pdf["data"].startswith("JVBERi")  # %PDF


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
