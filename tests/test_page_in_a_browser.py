"""The report as a page in Chromium: nothing overflows, nothing is loaded, columns sort, it prints."""

import json
import re
import shutil

import pytest
from models import transformed, with_names_that_are_markup
from torch import nn

import fxprop


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
        "evil": transformed(with_names_that_are_markup(), (2, 4), 0.5),
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
