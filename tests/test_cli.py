"""The command line as a user runs it."""

import io
import json
import pickle
import re
import zipfile

import pytest
import torch
from torch import nn

import fxprop
from fxprop.cli import main as cli
from fxprop.cli.models.sources import Source, load


def run(capsys, *argv):
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def make_net(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 16, 2))


def reads_values():
    if torch.linspace(0, 1, 3)[1].item() > 0:  # impossible on the meta device
        return make_net()
    return None


def broken():
    raise ValueError("no such luck")


def not_a_model():
    return 3


HERE = f"{__name__}:"
INPUT = ("--input", "2x3x6x6")


def test_report(capsys):
    code, out, err = run(capsys, "report", "resnet18", "--keep", "0.05")
    assert (code, err) == (0, "")
    assert "ResNet: 20 layers rewritten, 1 dense, 0 skipped" in out
    assert re.search(r"whole backward .* 9\d\.\d %", out)


@pytest.mark.parametrize("format_", ["text", "markdown", "json", "csv", "html"])
def test_formats_and_output_file(capsys, tmp_path, format_):
    file = tmp_path / "report"
    arguments = ("report", HERE + "make_net", *INPUT, "--format", format_)
    assert run(capsys, *arguments, "-o", str(file))[0] == 0
    assert run(capsys, *arguments)[1] == file.read_text()
    if format_ == "json":
        assert json.loads(file.read_text())["layers"][0]["k"] == 1


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("inception_v3", [8, 3, 299, 299]),
        ("r3d_18", [8, 3, 16, 112, 112]),
        ("lraspp_mobilenet_v3_large", [8, 3, 520, 520]),
        ("vit_h_14", [8, 3, 518, 518]),
    ],
)
def test_default_inputs_are_the_models_own(capsys, name, shape):
    arguments = ("--model-args", '{"image_size": 518}') if name == "vit_h_14" else ()
    code, out, err = run(capsys, "report", name, "--format", "json", *arguments)
    assert code == 0, err
    assert json.loads(out)["layers"][0]["input_shape"] == shape


def test_factories(capsys):
    code, out, _ = run(capsys, "report", HERE + "make_net", *INPUT, "--model-args", '{"width": 7}')
    assert code == 0
    assert "7x3x3x3" in out
    assert run(capsys, "report", HERE + "reads_values", *INPUT)[0] == 0


def test_layers(capsys):
    code, out, _ = run(capsys, "layers", "vit_b_16")
    assert code == 0
    assert re.search(r"conv_proj +Conv2d +conv2d +768x3x16x16 +8x768x14x14 +768 +150528 +8 +first", out)
    assert "heads.head" in out
    assert re.search(r"encoder_layer_0.self_attention.in_proj +- +linear +2304x768 +", out)


def test_code(capsys):
    code, out, _ = run(capsys, "code", HERE + "make_net", *INPUT, "--keep", "0.5")
    assert code == 0
    assert "fxprop_ops_conv2d(" in out
    assert out.startswith("def forward(self, input):")
    code, diff, _ = run(capsys, "code", HERE + "make_net", *INPUT, "--keep", "0.5", "--diff")
    assert diff.startswith("--- Sequential before\n+++ Sequential after\n@@")
    assert run(capsys, "code", HERE + "make_net", *INPUT, "--keep", "1", "--diff") == (0, "", "")


def test_policy_file_and_overrides(capsys, tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text("keep = 0.5\nscore = 'l2'\n[[rule]]\nname = 'layer1.*'\nk = 3\n")
    _, out, _ = run(
        capsys, "report", "resnet18", "--policy", str(file), "--keep", "0.25", "--format", "json"
    )
    layers = {layer["name"]: layer for layer in json.loads(out)["layers"]}
    assert (layers["layer1.0.conv1"]["k"], layers["layer2.0.conv1"]["k"]) == (3, 32)
    assert layers["layer2.0.conv1"]["score"] == "l2"


def test_saved_files(capsys, tmp_path):
    torch.manual_seed(0)
    model, x = make_net(), torch.randn(2, 3, 6, 6)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoint.pth")
    torch.save(model, tmp_path / "model.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    for weights in ("weights.pth", "checkpoint.pth"):
        arguments = (HERE + "make_net", *INPUT, "--weights", str(tmp_path / weights))
        assert run(capsys, "report", *arguments)[0] == 0
    code, _, err = run(capsys, "report", str(tmp_path / "model.pt"), *INPUT)
    assert code == 1
    assert "is a pickle" in err
    assert "--unsafe-pickle" in err
    _, pickled, _ = run(
        capsys, "report", str(tmp_path / "model.pt"), *INPUT, "--unsafe-pickle", "--format", "json"
    )
    code, exported, err = run(capsys, "report", str(tmp_path / "model.pt2"), "--format", "json")
    assert code == 0, err
    assert json.loads(pickled)["totals"] == json.loads(exported)["totals"]


def test_safetensors(capsys, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the safetensors extra")
    file = str(tmp_path / "weights.safetensors")
    safetensors.save_file(make_net().state_dict(), file)
    assert run(capsys, "report", HERE + "make_net", *INPUT, "--weights", file)[0] == 0


class Evil:
    def __reduce__(self):
        return print, ("code from the file ran",)


def test_weights_never_unpickle_code(capsys, tmp_path):
    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    arguments = (HERE + "make_net", *INPUT, "--weights", str(tmp_path / "evil.pth"))
    code, out, err = run(capsys, "report", *arguments)
    assert code == 1
    assert "cannot be read as weights" in err
    assert "code from the file ran" not in out + err


def test_exported_programs_never_unpickle_code(capsys, tmp_path):
    file = str(tmp_path / "evil.pt2")
    torch.export.save(torch.export.export(make_net(), (torch.randn(2, 3, 6, 6),)), file)
    assert run(capsys, "report", file)[0] == 0
    evil = io.BytesIO()
    torch.save(Evil(), evil)
    for member, code in (
        ("data/constants/custom_obj_0", pickle.dumps(Evil())),
        ("data/sample_inputs/model.pt", evil.getvalue()),
    ):
        changed = str(tmp_path / "changed.pt2")
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
            root = old.namelist()[0].partition("/")[0]
            for name in old.namelist():
                if name != f"{root}/{member}":
                    new.writestr(name, old.read(name))
            new.writestr(f"{root}/{member}", code)
        code, out, err = run(capsys, "report", changed)
        assert code == 1
        assert "add --unsafe-pickle" in err or "cannot be read as an exported program" in err
        assert "code from the file ran" not in out + err


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["report", "resnet5"], r"unknown model 'resnet5'.*Nearest: resnet50"),
        (["report", "resnet18", "--keep", "0"], r"keep=0.0: expected a number with 0 < keep <= 1"),
        (["report", "resnet18", "--keep", "abc"], r"--keep abc: expected a number"),
        (["report", "resnet18", "--keep", "nan"], r"keep=nan"),
        (["report", "resnet18", "--select", "chanel"], r"select='chanel': expected one of channel, element"),
        (["report", "resnet18", "--score", "l5"], r"unknown score 'l5'"),
        (["report", "resnet18", "--policy", "none.toml"], r"none.toml: cannot be read"),
        (["report", "resnet18", "--input", "8x3x4"], r"cannot run.*float32\[8, 3, 4\].*fails at layer 'conv1'"),
        (["report", "resnet18", "--input", "8*3"], r"--input 8\*3: expected sizes joined by x"),
        (["report", "resnet18", "--input", "8x3:real"], r"--input 8x3:real"),
        (["report", "resnet18", "--weights", "IMAGENET"], r"--weights IMAGENET: resnet18 has IMAGENET1K_V1"),
        (["report", "resnet18", "--weights", "no.pth"], r"no.pth: no such file"),
        (["report", "no_such_package:make"], r"cannot import no_such_package"),
        (["report", HERE + "make_ne", *INPUT], r"has no 'make_ne'; nearest: make_net"),
        (["report", HERE + "make_net"], r"needs --input"),
        (["report", HERE + "broken", *INPUT], r"building .*broken failed: ValueError: no such luck"),
        (["report", HERE + "not_a_model", *INPUT], r"returned a int: expected a torch.nn.Module"),
        (["report", HERE + "HERE", *INPUT], r"is a str: expected a factory"),
        (["report", HERE + "make_net", *INPUT, "--model-args", "{"], r"--model-args {: not valid JSON"),
        (["report", HERE + "make_net", *INPUT, "--model-args", "3"], r"expected an object"),
        (["report", "model.pt2"], r"model.pt2: no such file"),
        (["report", "resnet18", "-o", "/no/such/folder/x"], r"cannot write /no/such/folder/x"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_1(capsys, argv, match):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"fxprop: error: [^\n]+\n", err), err
    assert re.search(match, err), err


def test_usage_errors_exit_2(capsys):
    for argv in (["repot"], ["report"], ["report", "resnet18", "--no-such-option"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(argv)


def test_debug_shows_where(capsys):
    _, _, err = run(capsys, "report", "resnet5", "--debug")
    assert "Traceback" in err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fxprop {fxprop.__version__}\n"


@pytest.mark.short
def test_timm_and_transformers(capsys, tmp_path):
    pytest.importorskip("timm", reason="timm is an optional extra")
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    code, out, _ = run(capsys, "report", "timm:resnet10t", "--keep", "0.1")
    assert code == 0
    assert "symbolic front-end" in out
    small = json.dumps({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4})
    code, out, _ = run(capsys, "layers", "hf:BertConfig", "--model-args", small)
    assert code == 0
    assert "encoder.layer.0.intermediate.dense" in out
    named = '{"input_ids": "2x7:int64", "attention_mask": "2x7:int64", "use_cache": false}'
    code, out, _ = run(
        capsys, "report", "hf:GPT2LMHeadModel", "--model-args", '{"n_layer": 1}', "--input", named,
        "--format", "csv",
    )  # fmt: skip
    assert code == 0
    assert "14x768" in out
    config = transformers.BertConfig(**json.loads(small))
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    capsys.readouterr()
    code, out, _ = run(capsys, "report", f"hf:{tmp_path}", "--frontend", "submodules")
    assert code == 0
    assert out.startswith("BertForMaskedLM:")
    code, out, _ = run(capsys, "code", f"hf:{tmp_path}", "--diff")
    assert out.startswith("--- BertForMaskedLM before")
    assert "@@ bert.encoder.layer.0.attention.self.query: " in out


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["report", "timm:resnet18_"], "unknown timm model 'resnet18_'. Nearest: resnet18"),
        (["report", "hf:BertConfi"], "unknown transformers configuration or model class.*BertConfig"),
        (["report", "hf:BertTokenizer"], "neither a configuration nor a model class"),
        (["report", "hf:BertConfig", "--weights", "DEFAULT"], "give the directory that holds the weights"),
        (["report", "hf:BertConfig", "--input", "{bad"], "not valid JSON"),
    ],
)  # fmt: skip
def test_library_errors(capsys, argv, match):
    pytest.importorskip("timm", reason="timm is an optional extra")
    pytest.importorskip("transformers", reason="transformers is an optional extra")
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert re.search(match, err), err


@pytest.mark.slow
def test_a_detection_model_from_its_name(capsys):
    code, out, _ = run(capsys, "report", "ssdlite320_mobilenet_v3_large")
    assert code == 0
    assert "submodules front-end, train mode" in out
    assert "reads values" in out


def test_frontend_option(capsys):
    code, out, _ = run(capsys, "report", HERE + "make_net", *INPUT, "--frontend", "export")
    assert code == 0
    assert "export front-end" in out


def test_what_is_measured_has_gradients():
    """torchvision's vit begins with a last layer that is zero, behind which every gradient would be."""
    loaded = load(Source("vit_b_32", inputs=["1x3x224x224"], real=True))
    loss = loaded.model(*loaded.inputs).square().mean()
    grad = torch.autograd.grad(loss, loaded.model.conv_proj.weight)[0]
    assert grad.abs().max() > 0
    on_meta = load(Source("vit_b_32")).model
    assert all(parameter.is_meta for parameter in on_meta.parameters())
