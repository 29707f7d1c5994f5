"""`fxprop dump`: a folder for bug reports; and the policy that says for each layer what was decided."""

import json
import shutil
import subprocess
import tomllib

import pytest
import torch
import torchvision
from test_inspect import Untraceable, X, net
from torch import nn

import fxprop
from fxprop.cli import main as cli
from fxprop.errors import ModelError, ReportError
from fxprop.inspection.code import generated_code
from fxprop.inspection.decided_policy import make_decided_policy
from fxprop.pipeline.recipe import recipe_of
from fxprop.policy.files import to_toml
from fxprop.timing import tune
from fxprop.timing.layer_times import SiteTimes

FILES = {
    "index.md", "code_before.py", "code_after.py", "code.diff", "report.html", "report.txt", "report.md",
    "report.json", "report.csv", "policy.toml", "policy_resolved.toml", "environment.txt", "backward.py",
}  # fmt: skip


@pytest.mark.parametrize("model", [net, Untraceable])
def test_the_files_say_what_the_functions_say(tmp_path, model):
    gm, report = fxprop.transform(
        model(), fxprop.Policy(keep=0.25, when="always"), (torch.randn(4, 3, 8, 8),)
    )
    written = fxprop.dump(gm, tmp_path / "new" / "folder")
    texts = {file.name: file.read_text(encoding="utf-8") for file in written}
    assert written[0].name == "index.md"
    assert set(texts) == FILES == {file.name for file in (tmp_path / "new" / "folder").iterdir()}
    assert texts["code_after.py"] == generated_code(gm) + "\n"
    assert texts["code_before.py"] == generated_code(fxprop.restore(gm)) + "\n"
    assert texts["code.diff"] == fxprop.code_diff(gm)
    assert json.loads(texts["report.json"]) == json.loads(report.to_json())
    assert texts["report.csv"] == report.to_csv()
    assert texts["report.html"] == report.to_html(fxprop.code_diff(gm))
    assert tomllib.loads(texts["policy.toml"])["keep"] == 0.25
    assert f"torch {torch.__version__.partition('+')[0]}" in texts["environment.txt"]
    assert "fxprop " in texts["environment.txt"]
    assert all(f"[{name}]({name})" in texts["index.md"] for name in FILES)
    assert "| fxprop.ops.conv_batch_norm" in texts["index.md"]


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
@pytest.mark.parametrize("model", [net, Untraceable])
def test_patch_makes_the_code_after_of_the_code_before(tmp_path, model):
    gm = fxprop.transform(
        model(), fxprop.Policy(keep=0.25, when="always"), (torch.randn(4, 3, 8, 8),)
    ).module
    fxprop.dump(gm, tmp_path)
    subprocess.run(
        ["patch", "--fuzz=0", "code_before.py", "code.diff"], cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "code_before.py").read_text() == (tmp_path / "code_after.py").read_text()


def test_what_cannot_be_written(tmp_path):
    gm = fxprop.transform(net(), 0.25, (X,)).module
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"cannot write to .*file: (File exists|Not a directory)"):
        fxprop.dump(gm, tmp_path / "file")
    with pytest.raises(ModelError, match="expected the module that fxprop.transform returned"):
        fxprop.dump(net(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_command(capsys, tmp_path):
    folder = tmp_path / "dumped"
    assert cli.main(["dump", "tests.test_inspect:net", str(folder), "--input", "4x3x8x8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(folder / name) for name in [line.rpartition("/")[2] for line in printed]]
    assert {line.rpartition("/")[2] for line in printed} == FILES


# --- the resolved policy ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """One weight used twice, with room between for a rule on one use alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(self.a(self.b(self.a(x))))


CASES = {
    "exact": (torchvision.models.resnet18, (2, 3, 64, 64), fxprop.Policy(keep=0.1)),
    "chains": (torchvision.models.resnet50, (2, 3, 64, 64), fxprop.Policy.fast(0.1)),
    "vit": (lambda: torchvision.models.vit_b_16(image_size=64), (2, 3, 64, 64), fxprop.Policy.fast(0.1)),
    "element": (torchvision.models.resnet18, (2, 3, 64, 64), fxprop.Policy(keep=0.1, select="element")),
    "row-sparse": (torchvision.models.resnet18, (2, 3, 64, 64), fxprop.Policy(keep=0.1, weight_grad="row_sparse")),
    "twice": (Twice, (2, 8), fxprop.Policy(k=2, rules=[fxprop.Rule(name="a#2", k=3), fxprop.Rule(where=lambda s: s.is_output, k=1)])),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_resolved_policy_decides_alike(tmp_path, case):
    make, shape, policy = CASES[case]
    with torch.device("meta"):
        model, x = make(), torch.empty(shape)
    gm, report = fxprop.transform(model, policy, (x,))
    file = tmp_path / "policy.toml"
    file.write_text(to_toml(make_decided_policy(recipe_of(gm))), encoding="utf-8")
    again, of_again = fxprop.transform(model, file, (x,))
    wanted, found = (list(recipe_of(module).plans.values()) for module in (gm, again))
    for plan, other in zip(wanted, found, strict=True):
        assert [d.sparsity for d in plan.decisions] == [d.sparsity for d in other.decisions]
    assert report.totals == of_again.totals
    assert generated_code(gm) == generated_code(again)


def test_the_resolved_policy_holds_what_was_measured(monkeypatch):
    gm, _ = fxprop.transform(net(), fxprop.Policy(keep=0.25, when="always"), (X,))
    monkeypatch.setattr(tune, "time_site", lambda *_: SiteTimes(0.001, 0.004))
    fxprop.tune(gm, names=["3"])
    rules = {rule.name: rule for rule in make_decided_policy(recipe_of(gm)).rules}
    assert rules["3"].keep == 1.0
    assert rules["0"].k == 4
