"""The README, the guide and the notebooks' texts: their Python runs, their links lead somewhere, their tables hold."""

import dataclasses
import functools
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprop
from fxprop import errors, settings
from fxprop.cli import main as cli
from fxprop.ops import registered, scores
from fxprop.report.records import Layer
from fxprop.report.records import Totals as ReportTotals

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "examples" / "guide"
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("*.md"))]


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(text, language):
    """The fenced blocks of a language, also those in lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


def small():
    """A stand-in for what the pages call `model`."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(256, 4),
    )
    model.body = nn.Identity()
    return model


def namespace():
    torch.manual_seed(0)
    model, images = small(), torch.randn(8, 3, 8, 8)
    labels = torch.arange(8) % 4
    return {
        "torch": torch, "nn": nn, "F": F, "fxprop": fxprop, "model": model, "images": images, "labels": labels,
        "gm": fxprop.transform(model, 0.5, (images,)).module,
        "loader": [(images, labels)] * 2, "batches": [(images, labels)] * 2, "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }  # fmt: skip


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Nothing is compiled to machine code, which takes seconds and is tested elsewhere; files go to a folder."""
    monkeypatch.setenv("FXPROP_FUSE", "0")
    monkeypatch.setenv("FXPROP_TINY", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    # what the pages register is forgotten
    for module, name in ((scores, "_SCORES"), (registered, "_CUSTOM")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in text_of(p)], ids=lambda page: page.stem
)
def test_the_python_of_a_page_runs(page):
    names = namespace()
    if "transformers." in text_of(page):
        names["transformers"] = pytest.importorskip("transformers")
    for block in blocks(text_of(page), "python"):
        exec(compile(block, str(page), "exec"), names)


def test_blocks_in_lists_are_seen():
    assert blocks("- so:\n  ```python\n  x = 1\n  ```\n", "python") == ["x = 1\n"]


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def cells_of(notebook, kind):
    return [c for c in json.loads(text_of(notebook))["cells"] if c["cell_type"] == kind]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_at_a_small_size(notebook):
    """By exec, without a kernel: a last line's value is all that a kernel would do more."""
    names = {"__name__": "notebook"}
    if "import transformers" in text_of(notebook):
        pytest.importorskip("transformers")
    for cell in cells_of(notebook, "code"):
        exec(compile("".join(cell["source"]), str(notebook), "exec"), names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_committed_as_it_ran(notebook):
    """From the first cell to the last, without an error, with a picture."""
    code = cells_of(notebook, "code")
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert notebook.stat().st_size < 300_000


def test_there_are_five_notebooks():
    assert [notebook.stem[0] for notebook in NOTEBOOKS] == list("12345")


# --- links ------------------------------------------------------------------------------------------------


def anchors(text):
    """As GitHub makes them of headings."""
    text = re.sub(r"^( *)```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page, text):
    text = re.sub(r"^( *)```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(text_of(target)):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert list(dead_links(page, text_of(page))) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_links_of_a_notebook_lead_somewhere(notebook):
    text = "\n".join("".join(cell["source"]) for cell in cells_of(notebook, "markdown"))
    assert list(dead_links(notebook, text)) == []


@pytest.mark.parametrize("link", ["nowhere.md", "errors.md#nothing", "#nothing", "../x.svg"])
def test_a_dead_link_is_noticed(link):
    assert list(dead_links(GUIDE / "README.md", f"[a]({link}) ![b]({link})"))


def test_every_page_of_the_guide_is_in_its_table_of_contents():
    contents = text_of(GUIDE / "README.md")
    assert [p.name for p in GUIDE.glob("*.md") if f"({p.name})" not in contents] == ["README.md"]


def test_paths_that_the_report_prints_are_there():
    from fxprop.report.learning import GUIDE as PRINTED

    assert (ROOT / PRINTED).exists()


# --- what the pages say of the code -----------------------------------------------------------------------


def test_the_readme_is_one_page():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 200


def test_the_readmes_report_is_what_the_command_prints(capsys):
    """All lines of it, but for two modules of which the README leaves the lines out."""
    assert cli.main(["report", "resnet50", "--keep", "0.05", "-q"]) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = blocks(text_of(ROOT / "README.md"), "text")[0].splitlines()
    assert [line for line in shown if "..." not in line and line not in printed] == []
    assert any("predicted" in line for line in shown)


def test_the_guide_has_the_table_of_settings():
    assert settings.as_markdown() in text_of(GUIDE / "policies.md")


def test_every_error_has_an_entry_that_says_what_to_do():
    entries = text_of(GUIDE / "errors.md").split("\n## ")[1:]
    by_class = {entry.partition("\n")[0].strip("`"): entry for entry in entries}
    classes = {n: e for n, e in vars(errors).items() if inspect.isclass(e) and issubclass(e, Exception)}
    assert set(by_class) == set(classes)
    for name, error in classes.items():
        assert error.__doc__
        assert "**Do**" in by_class[name] or error is errors.FxpropError


def test_the_schema_is_written_down():
    text = text_of(GUIDE / "report-schema.md")
    report = fxprop.estimate(small(), 0.5, (torch.randn(2, 3, 8, 8),))
    names = [*report.to_dict(), *report.to_dict()["layers"][0], *report.to_dict()["totals"]]
    names += [field.name for of in (Layer, ReportTotals) for field in dataclasses.fields(of)]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_command_is_in_the_guide():
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    from fxprop.cli.main import _parser

    commands = next(a for a in _parser()._actions if a.choices).choices
    text = text_of(GUIDE / "command-line.md")
    assert [name for name in commands if f"fxprop {name}" not in text] == []
