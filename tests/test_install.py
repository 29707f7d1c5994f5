"""What has to be installed: the core runs with torch and tabulate; what else is needed says so."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprop
from fxprop import progress
from fxprop.cli import main as cli
from fxprop.errors import PolicyError, ReportError
from fxprop.policy.files import to_toml

ROOT = Path(__file__).parents[1]
LATE = ("tqdm", "jinja2", "tomli_w", "shtab", "matplotlib", "torchvision")

CORE = """
import sys
import torch  # brings jinja2 for itself, and uses tqdm where it is
for name in LATE:
    for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        del sys.modules[loaded]
    sys.modules[name] = None
import fxprop
from fxprop.cli.main import main
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
x = torch.randn(2, 3, 6, 6)
gm, report = fxprop.transform(model, fxprop.Policy(keep=0.5, when="always"), (x,))
gm(x).sum().backward()
print(report)
assert report.to_json() and report.to_csv() and report.to_markdown()
assert report._repr_html_() is None
fxprop.measure(model, 0.5, (x,), rounds=1, progress=True)
torch.export.save(torch.export.export(model, (x,)), "model.pt2")
for command in (["report", "model.pt2"], ["layers", "model.pt2"], ["explain", "model.pt2", "0"], ["code", "model.pt2"]):
    assert main(command) == 0, command
"""


def test_the_core_runs_with_torch_and_tabulate_alone(tmp_path):
    code = CORE.replace("LATE", repr(LATE))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "2 layers rewritten" in result.stdout
    assert result.stderr.count("fxprop: progress is not shown: pip install tqdm") == 1


@pytest.fixture
def without(monkeypatch):
    def block(name):
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)

    return block


def test_a_page_needs_jinja2(without, monkeypatch):
    report = fxprop.estimate(nn.Linear(2, 2), 0.5, (torch.randn(1, 2),))
    without("jinja2")
    monkeypatch.delitem(sys.modules, "fxprop.report.forms.page", raising=False)
    monkeypatch.delattr("fxprop.report.forms.page", raising=False)
    with pytest.raises(
        ReportError, match="a page needs jinja2, which is not installed: pip install jinja2"
    ):
        report.to_html()


def test_toml_needs_tomli_w(without):
    without("tomli_w")
    with pytest.raises(PolicyError, match="writing TOML needs tomli-w.*pip install tomli-w"):
        to_toml(fxprop.Policy(keep=0.5))


def test_completion_needs_shtab(without, capsys):
    without("shtab")
    assert cli.main(["completion", "bash"]) == 1
    assert "completion needs shtab, which is not installed: pip install shtab" in capsys.readouterr().err


def test_progress_without_tqdm_is_said_once(without, capsys):
    without("tqdm")
    progress._say_missing.cache_clear()
    for _ in range(2):
        assert list(progress.count([1, 2], "steps", True)) == [1, 2]
    assert capsys.readouterr().err.count("pip install tqdm") == 1
    progress._say_missing.cache_clear()


def test_whatever_is_imported_is_declared():
    """And what is declared is imported."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    optional = [line for lines in project["optional-dependencies"].values() for line in lines]
    core, declared = names(project["dependencies"]), names([*project["dependencies"], *optional])
    imported = set()
    for path in (ROOT / "fxprop").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    with_others = {"fxprop", "sympy", "functorch", "markupsafe"}  # these come with torch, and with jinja2
    assert {name for name in imported if name not in sys.stdlib_module_names} - with_others <= declared
    assert core <= imported


def names(requirements):
    return {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in requirements}
