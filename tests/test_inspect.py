"""The diff of the generated code, its colours, and what is said of one layer."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import fxprop
from fxprop.cli import main as cli
from fxprop.errors import ModelError, ReportError
from fxprop.inspection.code import code_changes, generated_code, op_counts
from fxprop.report.forms.diff_colours import as_html, for_terminal
from fxprop.timing import tune
from fxprop.timing.layer_times import SiteTimes

X = torch.empty(4, 3, 8, 8)
HEADING = re.compile(r"@@ -(\d+),(\d+) \+(\d+),(\d+) @@ ?(.*)")


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


class Untraceable(nn.Module):
    """Traced in parts: two of them have graphs of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = net()[:4], nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return self.b(self.a(x).flatten(1))


def transformed(model=None, keep=0.25, **settings):
    policy = fxprop.Policy(keep=keep, when="always", **settings)
    return fxprop.transform(model or net(), policy, (X,)).module


def applied(diff, before):
    """`before` with the hunks of one file's diff carried out by their line numbers."""
    old, new, at = before.splitlines(), [], 0
    lines = diff.splitlines()[2:]
    while lines:
        start, removed, position, added, _ = HEADING.fullmatch(lines.pop(0)).groups()
        start, removed, position, added = map(int, (start, removed, position, added))
        here = start - (removed > 0)
        new += old[at:here]
        gone, made = lines[:removed], lines[removed : removed + added]
        assert [line[1:] for line in gone] == old[here : here + removed]
        assert len(new) == position - (added > 0)
        new += [line[1:] for line in made]
        at, lines = here + removed, lines[removed + added :]
    return "\n".join(new + old[at:])


@pytest.mark.parametrize("settings", [{}, {"regions": False}, {"select": "element"}, {"score": "l2"}])
def test_the_diff_leads_from_the_code_before_to_the_code_after(settings):
    gm = transformed(**settings)
    before, after = generated_code(fxprop.restore(gm)), generated_code(gm)
    assert before != after
    assert applied(fxprop.code_diff(gm), before) == after


def test_applying_the_diff_to_other_code_fails():
    gm = transformed()
    with pytest.raises(AssertionError):
        applied(fxprop.code_diff(gm), generated_code(fxprop.restore(gm)).replace("_1", "_2"))


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
def test_patch_reads_the_diff(tmp_path):
    import torchvision

    gm = transformed(torchvision.models.resnet18())
    code = tmp_path / "code.py"
    code.write_text(generated_code(fxprop.restore(gm)) + "\n")
    command = ["patch", "--fuzz=0", str(code)]
    subprocess.run(command, input=fxprop.code_diff(gm), text=True, check=True, capture_output=True)
    assert code.read_text() == generated_code(gm) + "\n"


def test_each_layer_has_its_hunk_with_its_decision():
    diff = fxprop.code_diff(transformed(keep=0.25))
    headings = [HEADING.fullmatch(line)[5] for line in diff.splitlines() if line.startswith("@@")]
    assert [text.partition(" (")[0] for text in headings] == [
        "0: 4 of 16 channels, with batch_norm + relu",
        "3: 2 of 8 channels",
    ]


def test_every_changed_line_of_a_hunk_is_the_layers():
    import torchvision

    gm = transformed(torchvision.models.resnet18())
    changes = code_changes(gm)
    names = [change.decision.site.name for change in changes]
    layers = [layer for layer in fxprop.layers(torchvision.models.resnet18(), (X,)) if not layer.is_output]
    assert names == [layer.name for layer in layers]
    for change in changes:
        assert any("fxprop_ops" in line for line in change.after)
        # the line of the model's own code that calls the layer
        assert re.search(r"resnet\.py:\d+\)$", str(change).splitlines()[0])


def test_the_code_of_parts_is_one_text_for_patch():
    """Line numbers count through all parts, so that one file holds them."""
    gm = transformed(Untraceable())
    before, after = generated_code(fxprop.restore(gm)), generated_code(gm)
    assert re.findall("^# (.*)$", after, re.MULTILINE) == ["a", "b"]
    diff = fxprop.code_diff(gm)
    assert re.findall(r"^--- (.*)$", diff, re.MULTILINE) == ["Untraceable before"]
    assert len(HEADING.findall(diff)) == 3
    assert applied(diff, before) == after


def test_nothing_rewritten_no_diff():
    assert fxprop.code_diff(transformed(keep=1.0)) == ""
    assert for_terminal("") == ""


def test_operations_before_and_after():
    counts = op_counts(transformed(score="l2"))
    assert counts["Conv2d"] == (2, 0)
    assert counts["fxprop.ops.conv_batch_norm"] == (0, 1)
    assert counts["fxprop.ops.conv2d"] == (0, 1)
    assert counts["BatchNorm2d"] == counts["ReLU"] == (1, 0)
    assert counts["Linear"] == counts["Flatten"] == (1, 1)
    assert "getattr" not in counts
    dense = op_counts(transformed(keep=1.0))
    assert all(before == after for before, after in dense.values())
    assert op_counts(transformed(Untraceable()))["fxprop.ops.linear_activation"] == (0, 1)


def test_a_model_that_was_not_transformed():
    with pytest.raises(ModelError, match="expected the module that fxprop.transform returned"):
        fxprop.code_diff(net())


def test_colours_change_nothing_but_the_colour():
    diff = fxprop.code_diff(transformed())
    coloured = for_terminal(diff)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == diff
    assert coloured.splitlines()[3].startswith("\x1b[31m-")


def test_html_escapes_names():
    page = as_html("--- <script> before\n+++ <script> after\n@@ -1,1 +1,1 @@ a&b\n-    x\n+    y\n")
    assert "<script>" not in page
    assert "--- &lt;script&gt; before" in page
    assert '<span class="added">+    y' in page


def test_html_is_grouped_by_module():
    import torchvision

    page = as_html(fxprop.code_diff(transformed(torchvision.models.resnet18())))
    modules = re.findall(r'<span class="module">(.*)\n', page)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert [name for name in modules if "downsample" not in name] == ["the model itself", *blocks]
    under = page.partition('<span class="module">layer1.1\n')[2].partition('class="module"')[0]
    assert re.findall(r"@@ (\S+): ", under) == ["layer1.1.conv1", "layer1.1.conv2"]


# --- explain --------------------------------------------------------------------------------------------


def test_explain_says_everything_about_a_rewritten_layer():
    text = fxprop.explain(transformed(keep=0.25, score="l2"), "0")
    assert text.startswith("0: 4 of 16 channels, with batch_norm + relu\n")
    # 4 x 16 x 6 x 6 outputs of fan-in 3 x 3 x 3, twice; the input needs no gradient
    assert "2 x (4 x 16 x 6 x 6) outputs x (3 x 3 x 3) fan-in = 124,416 for each gradient" in text
    assert "dense       grad_input 0 + grad_weight 124,416 = 124,416" in text
    assert "sparse      grad_input 0 + grad_weight 31,104 = 31,104 (x 4 / 16)" in text
    assert "decided by  default" in text
    before, _, after = text.partition("code after")
    assert '= getattr(self, "0")(' in before
    assert "fxprop_ops_conv_batch_norm(" in after


def test_explain_says_why_rules_did_not_decide():
    rules = [
        fxprop.Rule(type="Linear", keep=0.5),
        fxprop.Rule(name="3", keep=0.5),
        fxprop.Rule(regex=".", score="l2"),
    ]
    text = fxprop.explain(transformed(rules=rules), "3")
    assert "decided by  rule 2 (name='3')" in text
    assert "rule 1 (type='Linear'): its type does not match" in text
    assert "rule 3 (regex='.'): not reached: an earlier rule matches" in text
    output = fxprop.explain(transformed(rules=[fxprop.Rule(regex=".", score="l2")]), "5")
    assert "rule 1 (regex='.'): matches, but output layer decides" in output
    assert "because     output layer" in output


def test_explain_tells_what_was_measured(monkeypatch):
    gm = transformed()
    assert "clock" not in fxprop.explain(gm, "0")
    monkeypatch.setattr(tune, "time_site", lambda *_: SiteTimes(0.004, 0.001))
    tune.tune(gm, names=["0"])
    assert "  clock       measured 4.00 ms dense, 1.00 ms sparse on cpu: 4.00x\n" in fxprop.explain(gm, "0")
    assert "clock" not in fxprop.explain(gm, "3")
    monkeypatch.setattr(tune, "time_site", lambda *_: SiteTimes(0.001, 0.004))
    tune.tune(gm, names=["3"])
    text = fxprop.explain(gm, "3")
    assert "because     measured 1.00 ms dense, 4.00 ms sparse on cpu: 0.25x" in text
    assert "decided by  tune" in text


def test_explain_names_the_generated_node():
    gm = transformed()
    assert "graph node  _2 = call_function fxprop.ops.conv_batch_norm in Sequential" in fxprop.explain(
        gm, "0"
    )
    assert "graph node  _5 = call_module 5 in Sequential" in fxprop.explain(gm, "5")


def test_explain_names_near_misses():
    with pytest.raises(ReportError, match="no layer '33' in this model; nearest names: 3"):
        fxprop.explain(transformed(), "33")


def test_explain_without_shapes():
    gm = fxprop.transform(net(), fxprop.Policy(keep=0.25)).module
    assert "FLOPs" not in fxprop.explain(gm, "3")


# --- the command line ------------------------------------------------------------------------------------

MODEL = ["tests.test_inspect:net", "--input", "4x3x8x8", "--keep", "0.25", "--when", "always"]


def run(capsys, *args):
    code = cli.main(args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_colour_on_a_terminal_and_only_there(capsys, monkeypatch):
    _, plain, _ = run(capsys, "code", *MODEL, "--diff")
    assert "\x1b" not in plain
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, coloured, _ = run(capsys, "code", *MODEL, "--diff")
    assert coloured == for_terminal(plain)
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(capsys, "code", *MODEL, "--diff")[1] == plain


def test_diff_as_html(capsys):
    code, out, _ = run(capsys, "code", *MODEL, "--diff", "--format", "html")
    assert (code, out.count('<span class="hunk">')) == (0, 2)
    code, _, err = run(capsys, "code", *MODEL, "--format", "html")
    assert (code, err) == (1, "fxprop: error: --format html shows a diff: add --diff\n")


def test_explain_command(capsys):
    code, out, _ = run(capsys, "explain", MODEL[0], "3", *MODEL[1:])
    assert (code, out.splitlines()[0].partition(" (")[0]) == (0, "3: 2 of 8 channels")
    code, out, _ = run(capsys, "explain", MODEL[0], "3", *MODEL[1:], "--tune")
    assert code == 0
    assert re.search(r"measured [\d.]+ ms dense, [\d.]+ ms sparse on cpu: [\d.]+x", out)
    code, _, err = run(capsys, "explain", MODEL[0], "conv9", *MODEL[1:])
    assert code == 1
    assert err.startswith("fxprop: error: no layer 'conv9' in this model")
