"""What is known of the machine: measured, kept in a file, and used by predictions."""

import json

import pytest
import torch
from torch import nn

import fxprop
from fxprop.cli.main import main
from fxprop.errors import InputError
from fxprop.plan.decisions import Sparsity
from fxprop.policy import cost_model as cost
from fxprop.policy.machine import USUAL, Machine, machine, machines_file, remember, this_machine
from fxprop.timing import calibrate as calibrating

SLOW_MEMORY = {"entry": 500.0, "convolution": 0.5, "pointwise": 0.25, "depthwise": 7.0}


@pytest.fixture
def file(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "machines.json"
    monkeypatch.setenv("FXPROP_MACHINE", str(file))
    return file


@pytest.fixture
def small(monkeypatch):
    """Parts that take no time."""
    monkeypatch.setattr(calibrating, "_PRODUCT", (64, 64, 64))
    monkeypatch.setattr(calibrating, "_FEW", (64, 64, 64, 8))
    monkeypatch.setattr(calibrating, "_BETWEEN", ((2, 8, 8, 8),))
    for kind, groups in (("convolution", 1), ("pointwise", 1), ("depthwise", 8)):
        monkeypatch.setitem(
            calibrating._CONVOLUTIONS, kind, ((8, 8, 8, 3 - 2 * (kind == "pointwise"), groups),)
        )


def sites(layer, shape):
    with torch.device("meta"):
        model = nn.Sequential(layer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    return fxprop.layers(model, (torch.empty(*shape, device="meta", requires_grad=True),))


def test_what_is_measured_is_kept_for_this_number_of_threads(file, small):
    assert machine() is USUAL
    measured = fxprop.calibrate(rounds=1)
    assert measured.name == this_machine()
    assert all(getattr(measured, part) > 0 for part in SLOW_MEMORY)
    assert machine() == measured
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert machine() is USUAL
    finally:
        torch.set_num_threads(threads)


def test_machines_are_kept_side_by_side(file):
    other, here = Machine("another", **SLOW_MEMORY), Machine(this_machine(), entry=1.0)
    assert remember(other) == remember(here) == file
    assert [entry["name"] for entry in json.loads(file.read_text())] == ["another", this_machine()]
    assert machine() == here
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_nothing_is_written_where_none_is_asked_for(file, small, monkeypatch):
    fxprop.calibrate(rounds=1, save=False)
    assert not file.exists()
    monkeypatch.setenv("FXPROP_MACHINE", "")
    assert machines_file() is None
    assert remember(Machine("any")) is None


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_without_a_file_it_is_the_users_cache(tmp_path, monkeypatch, variable):
    monkeypatch.delenv("FXPROP_MACHINE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    inside = ".cache/fxprop" if variable == "HOME" else "fxprop"
    assert machines_file() == tmp_path / inside / "machines.json"


@pytest.mark.parametrize("text", ["{", "3", '[{"name": "x", "speed": 3}]', '["x"]'])
def test_a_file_of_something_else_is_an_error(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(InputError, match=r"machines\.json does not hold .* delete it, and calibrate"):
        machine()


def test_torchs_generator_is_left_alone(file, small):
    before = torch.get_rng_state()
    fxprop.calibrate(rounds=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_numbers_come_back(monkeypatch):
    """Of a machine whose parts take exactly as long as the cost model says."""
    made = Machine("made", entry=40.0, convolution=0.5, pointwise=1.5, depthwise=9.0)
    flop = 1e-11
    seconds = [4.0 * 1576 * 768 * 3072]
    rows, n_in, n_out, k = calibrating._FEW
    # both products read or write the input; what is kept of gradient and weight is moved four times
    few = 2 * 2 * rows * n_in * k + made.entry * (2 * rows * n_in + 4 * k * (rows + n_in))
    seconds.append(few)
    seconds += [made.entry * 11.5 * n * c * h * w for n, c, h, w in calibrating._BETWEEN]
    for kind, convolutions in calibrating._CONVOLUTIONS.items():
        for n_in, n_out, size, kernel, groups in convolutions:
            multiply_adds = 8 * size**2 * n_out * kernel**2 * n_in // groups
            sizes = 8 * size**2 * (n_in + n_out) + n_out * kernel**2 * n_in // groups
            seconds.append(2 * (2 * multiply_adds * getattr(made, kind) + made.entry * sizes))
    times = iter([flop * of for of in seconds])
    monkeypatch.setattr(calibrating, "time_interleaved", lambda calls, rounds, device: [next(times)])
    found = fxprop.calibrate(save=False)
    for part in SLOW_MEMORY:
        assert getattr(found, part) == pytest.approx(getattr(made, part)), part
    assert next(times, None) is None


def test_predictions_are_for_the_machine_and_name_it(file):
    model, x = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 64)), torch.empty(512, 1024)
    policy = fxprop.Policy(keep=0.25, when="always")
    usual = fxprop.estimate(model, policy, (x,))
    assert "predicted for a 2-core x86 CPU, float32, with SGD; fxprop calibrate" in " ".join(
        str(usual).split()
    )
    remember(Machine(this_machine(), **SLOW_MEMORY))
    here = fxprop.estimate(model, policy, (x,))
    assert here.clock.machine == this_machine()
    assert f"predicted for {this_machine()}, with SGD; fxprop bench" in " ".join(str(here).split())
    # products are a smaller part of the time
    assert here.clock.backward < usual.clock.backward


def test_decisions_are_for_the_machine(file):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 64))
    x = torch.empty(512, 1024, device="meta")
    policy = fxprop.Policy(keep=0.5)
    assert fxprop.estimate(model, policy, (x,)).layers[0].status == "rewritten"
    remember(Machine(this_machine(), entry=5000.0))
    layer = fxprop.estimate(model, policy, (x,)).layers[0]
    assert "memory-bound: predicted 0." in layer.reason


def test_few_channels_are_computed_in_blocks_or_by_products():
    site = sites(lambda: nn.Conv2d(64, 64, 3, padding=1), (8, 64, 56, 56))[0]
    fast = Machine("fast convolutions", convolution=0.5)
    dense = cost.dense_work(site, fast)
    assert dense == pytest.approx(0.5 * 2 * site.axes.multiply_adds)
    # a block of 16 for 15 channels; 3 by products, which are slower there
    assert cost.kept_work(site, Sparsity(15, 64), 15, fast) == pytest.approx(dense * 16 / 64)
    assert cost.kept_work(site, Sparsity(3, 64), 3, fast) == pytest.approx(2 * dense * (3 + 4.4) / 64)


def test_a_1x1_convolution_is_computed_by_products():
    site = sites(lambda: nn.Conv2d(64, 64, 1), (8, 64, 56, 56))[0]
    fast = Machine("fast convolutions", pointwise=0.5)
    usual = cost.kept_work(site, Sparsity(32, 64), 32, USUAL)
    assert cost.kept_work(site, Sparsity(32, 64), 32, fast) == pytest.approx(usual)
    assert cost.dense_work(site, fast) == pytest.approx(cost.dense_work(site, USUAL) / 2)


@pytest.mark.parametrize(
    "layer",
    [lambda: nn.Conv2d(64, 64, 1, groups=2), lambda: nn.ConvTranspose2d(64, 64, 1)],
    ids=["groups", "transposed"],
)
def test_other_1x1_convolutions_are_computed_by_their_kernels(layer):
    site = sites(layer, (8, 64, 56, 56))[0]
    fast = Machine("fast convolutions", pointwise=0.5)
    n = site.n("channel")
    assert cost.kept_work(site, Sparsity(16, n), 16, fast) == pytest.approx(
        cost.dense_work(site, fast) * 16 / n
    )


def test_the_command(file, small, capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["calibrate", "--rounds", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "1 thread, float32" in out.splitlines()[0]
    assert "a FLOP of a depthwise convolution" in out
    assert f"Written to {file}" in out
    assert json.loads(file.read_text())[0]["name"] == out.splitlines()[0]
