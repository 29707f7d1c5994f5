"""The examples run, at tiny size; real digits are learned."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets.mnist import MNIST

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *argv):
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, argv)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def write_idx(path, tensor):
    """A uint8 tensor in MNIST's own file format."""
    header = bytes([0, 0, 8, tensor.dim()]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    path.write_bytes(header + tensor.numpy().tobytes())


@pytest.fixture
def tiny_mnist(tmp_path):
    """Noise in the shape of MNIST, where torchvision's class finds it."""
    raw = tmp_path / MNIST.__name__ / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 128), ("t10k", 64)):
        write_idx(raw / f"{name}-images-idx3-ubyte", torch.randint(0, 256, (count, 28, 28)).byte())
        write_idx(raw / f"{name}-labels-idx1-ubyte", torch.randint(0, 10, (count,)).byte())
    return tmp_path


def test_finetune():
    out = run("finetune_resnet.py", "--steps", 2, "--batch", 2, "--size", 64)
    assert "20 layers rewritten" in out
    assert re.search(r"backward [\d.]+x, whole step [\d.]+x as fast as dense", out)
    dense, sparse = re.findall(r"losses ([\d.]+), ([\d.]+)", out)
    assert dense[0] == sparse[0]  # the same forward from the same weights
    assert dense[1] != sparse[1]


@pytest.mark.parametrize("sync", [False, True])
def test_ddp(sync):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--epochs=2", *(["--sync-selection"] if sync else [])]
    result = subprocess.run(
        [*command, EXAMPLES / "train_ddp.py", *options], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"keep ([\d.]+), loss ([\d.]+), (\d+) of 512 rows kept", result.stdout)
    assert [keep for keep, _, _ in lines] == ["1.00", "0.10"]
    rows = int(lines[1][2])
    assert rows == 51 if sync else rows > 51  # 10 % of 512; alone, each process keeps its own


@pytest.mark.parametrize("select", ["element", "channel", "dense"])
def test_mnist(tiny_mnist, select):
    out = run("mnist_cnn.py", "--data", tiny_mnist, "--select", select, "--epochs", 1)
    assert re.search(r"epoch 1: accuracy [\d.]+ %, backward [\d.]+ of [\d.]+ s", out)
    assert f"{0 if select == 'dense' else 3} layers rewritten" in out


@pytest.mark.parametrize(("examples", "kept"), [("0.5", "50%"), ("1", "100%")])
def test_part_of_batch(tiny_mnist, examples, kept):
    out = run("part_of_batch.py", "--data", tiny_mnist, "--examples", examples, "--epochs", 1)
    assert re.search(rf"epoch 1: accuracy [\d.]+ %, {kept} of the examples, [\d.]+ s", out)


def test_mnist_table(tiny_mnist, tmp_path):
    options = ("benchmarks/mnist_table.py", "--data", tiny_mnist, "--out", tmp_path / "runs.jsonl")
    out = run(*options, "--rows", "dense", "element-5", "--epochs", 1, 2, "--rates", 1e-3, 1e-2)
    assert len(re.findall(r"^\| (?:dense|element 5 %) +\| 2 +\| 0.0?01 ", out, re.MULTILINE)) == 2
    assert out.count("epoch 2: ") == 4
    again = run(*options, "--epochs", 1)  # one run more of each row that is new
    assert again.count("epoch 1: ") == 3
    assert (
        len(re.findall(r"^\| (?:dense|element 5 %|channel 25 %|nonzero) +\| 1 +\| ", again, re.MULTILINE))
        == 4
    )


def test_fidelity(tiny_mnist):
    out = run("benchmarks/fidelity.py", "--data", tiny_mnist, "--epochs", 1, "--seeds", 1, "--keep", 0.25)
    cosines = re.findall(r"^\| \d+\.(?:weight|bias) +\| (-?[\d.]+) ", out, re.MULTILINE)
    assert len(cosines) == 12
    assert all(-1 <= float(cosine) <= 1 for cosine in cosines)
    assert re.search(r"\| fast +\| [\d.]+ ", out)
    assert re.search(
        r"keep 0.25, fast: Sequential: gradients against the dense ones on 2 mini-batches", out
    )


def test_cost_model():
    out = run(
        "benchmarks/cost_model.py", "resnet18", "--keep", 0.1, "--batch", 2, "--size", 64, "--rounds", 1
    )
    assert re.search(r"\d+ of \d+ layers judged as measured", out)


def test_rare_rows(capsys):
    main = runpy.run_path(str(EXAMPLES / "benchmarks" / "rare_rows.py"))["main"]
    main(["--shares", "0.25", "--noise", "0", "--steps", "300", "--rows", "50"])
    out = capsys.readouterr().out
    found = {(name.strip(), form.strip()): float(moved) for name, form, moved in re.findall(
        r"^\| (\S.*?) +\| (zeros|1/p|lazy) +\| ([\d.]+)", out, re.MULTILINE
    )}  # fmt: skip
    assert found["SGD", "zeros"] == pytest.approx(0.25, abs=0.03)  # as often, as far
    assert found["SGD", "1/p"] == pytest.approx(1, abs=0.1)
    assert found["Adam", "zeros"] == pytest.approx(0.25**0.5, abs=0.05)  # whatever the gradient's scale
    assert found["Adam", "1/p"] == pytest.approx(found["Adam", "zeros"], abs=0.01)
    assert 0.25 < found["SparseAdam", "lazy"] < found["Adam", "zeros"]


def test_examples_stay_short():
    for script in EXAMPLES.glob("*.py"):
        assert len(script.read_text().splitlines()) <= 65, script.name


DIGITS = os.environ.get("FXPROP_MNIST")


@pytest.mark.skipif(not DIGITS, reason="FXPROP_MNIST does not name a folder with MNIST in it")
def test_real_digits_are_learned():
    train = runpy.run_path(str(EXAMPLES / "mnist_cnn.py"))["train"]
    accuracies, _, report = train(DIGITS, "channel", 0.25, epochs=1, quiet=True)
    assert accuracies[0] > 90
    assert report.totals.saving > 0.7
