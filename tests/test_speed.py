"""The cost model, tuning, measuring, and `fxprop bench`. What is timed here is never judged by its speed."""

import copy
import json

import pytest
import torch
from models import IMAGES as X
from models import small
from torch import nn

import fxprop
from fxprop.cli.main import main
from fxprop.errors import InputError, ModelError, ReportError
from fxprop.plan.decisions import Sparsity
from fxprop.policy import cost_model as cost
from fxprop.timing import tune as tuning
from fxprop.timing.layer_times import SiteTimes
from fxprop.timing.picture import plot


class One(nn.Module):
    """One layer, and another behind it, so that the first is no output layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.last = layer, nn.Linear(1, 1)

    def forward(self, x):
        return self.last(self.layer(x).mean().reshape(1, 1))


def decided(layer, shape, **settings):
    with torch.device("meta"):
        model = One(layer())
    x = torch.empty(*shape, device="meta", requires_grad=True)
    return fxprop.estimate(model, fxprop.Policy(**{"keep": 0.05, **settings}), (x,)).layers[0]


# --- the cost model ---------------------------------------------------------------------------------------


def test_a_memory_bound_layer_stays_dense_and_says_why():
    layer = decided(lambda: nn.Conv2d(16, 16, 1), (8, 16, 112, 112), keep=0.75)
    assert layer.status == "dense"
    assert "1x1, memory-bound: predicted 0." in layer.reason
    assert "when='always'" in layer.reason
    assert decided(lambda: nn.Conv2d(16, 16, 1), (8, 16, 112, 112), keep=0.75, when="always").status == (
        "rewritten"
    )


def test_big_products_are_rewritten_and_small_layers_not_judged():
    assert decided(lambda: nn.Conv2d(256, 256, 3), (8, 256, 28, 28)).status == "rewritten"
    assert decided(lambda: nn.Linear(768, 3072), (1576, 768), keep=0.25).status == "rewritten"
    assert decided(lambda: nn.Conv2d(3, 8, 1), (2, 3, 6, 6), keep=0.9).status == "rewritten"


def test_prediction_falls_with_keep():
    def predicted(k):
        with torch.device("meta"):
            model = One(nn.Conv2d(128, 128, 3))
        site = fxprop.layers(model, (torch.empty(8, 128, 28, 28, device="meta"),))[0]
        return cost.predicted_speedup(site, Sparsity(k, 128))

    speedups = [predicted(k) for k in (4, 32, 64, 127)]
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[0] > 2
    assert speedups[-1] < 1


def test_small_regions_are_not_formed():
    def region(shape, **settings):
        with torch.device("meta"):
            model = One(nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()))
        policy = fxprop.Policy(**{"keep": 0.05, **settings})
        return fxprop.estimate(model, policy, (torch.empty(*shape, device="meta"),)).layers[0].region

    assert region((8, 64, 56, 56), score="l2") == "batch_norm + relu"
    assert region((2, 64, 8, 8), score="l2") is None
    assert region((8, 64, 56, 56), score="l1") is None
    assert region((8, 64, 112, 112), score="l1") == "batch_norm + relu"
    assert region((2, 64, 8, 8), score="l2", when="always") == "batch_norm + relu"


# --- tune -------------------------------------------------------------------------------------------------


def stub_times(monkeypatch, times):
    """Timings by layer in place of the clock's; returns what was asked for."""
    asked = []

    def time_site(site, sparsity, conditions, rounds=5):
        asked.append((site.name, site.input_shape, sparsity.k, conditions))
        return times[site.name]

    monkeypatch.setattr(tuning, "time_site", time_site)
    return asked


def two_convs():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 4))


def test_what_does_not_win_by_the_margin_is_left_dense(monkeypatch, tmp_path):
    asked = stub_times(monkeypatch, {"0": SiteTimes(2e-3, 1.95e-3), "2": SiteTimes(2e-3, 1e-3)})
    gm, _ = fxprop.transform(two_convs(), 0.25, (X,))
    cache = tmp_path / "tune.json"
    report = fxprop.tune(gm, (X,), cache=cache)
    first, second = report.layers[:2]
    assert (first.status, second.status) == ("dense", "rewritten")
    assert first.reason == "measured 2.00 ms dense, 1.95 ms sparse on cpu: 1.03x"
    assert first.decided_by == "tune"
    assert gm.code.count("fxprop_ops_conv2d") == 1
    assert [name for name, *_ in asked] == ["0", "2"]
    # another k has not been measured; back at the old one the choice stands
    assert fxprop.set_keep(gm, 0.5).layers[0].status == "rewritten"
    assert fxprop.set_keep(gm, 0.25).layers[0].status == "dense"
    # what the cache holds is not timed again
    twin, _ = fxprop.transform(two_convs(), 0.25, (X,))
    assert fxprop.tune(twin, (X,), cache=cache).layers[0].status == "dense"
    assert len(asked) == 2
    fxprop.tune(twin, (torch.randn(5, 3, 6, 6),), cache=cache)
    assert asked[-1][1] == (5, 16, 4, 4) or asked[-1][1][0] == 5
    assert fxprop.restore(gm).state_dict().keys() == gm.state_dict().keys()


def test_tune_really_times(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding_mode="circular", padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 8), nn.Linear(8, 4),
    )  # fmt: skip
    for policy in (0.25, fxprop.Policy.fast(0.25, when="always")):
        gm, _ = fxprop.transform(model, policy, (X,))
        report = fxprop.tune(gm, rounds=1, margin=-1e9, cache=tmp_path / "tune.json")
        assert {layer.name: layer.status for layer in report.layers} == {
            "0": "rewritten", "4": "rewritten", "5": "dense",
        }  # fmt: skip
        report = fxprop.tune(gm, rounds=1, margin=1, cache=tmp_path / "tune.json")
        assert {layer.status for layer in report.layers} == {"dense"}
    times = json.loads((tmp_path / "tune.json").read_text())
    assert len(times) == 3 or len(times) == 4
    assert all(seconds > 0 for pair in times.values() for seconds in pair)


def test_tune_refuses(tmp_path):
    with pytest.raises(ModelError, match="expected the module that fxprop.transform returned"):
        fxprop.tune(small())
    gm, _ = fxprop.transform(small(), 0.25, (X,))
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(InputError, match=r"bad\.json' cannot be read.*delete it"):
        fxprop.tune(gm, (X,), cache=tmp_path / "bad.json")


# --- measure ----------------------------------------------------------------------------------------------


def test_measure():
    model = small()
    before = copy.deepcopy(model.state_dict())
    found = fxprop.measure(model, [0.5, fxprop.Policy.fast(0.25)], (X,), rounds=3, sites=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [variant.name for variant in found.variants] == ["dense", "keep 0.5", "keep 0.25, fast"]
    data = json.loads(found.to_json())
    dense, half, _ = data["variants"]
    assert dense["speedup"]["backward"] == {"q1": 1, "median": 1, "q3": 1}
    _, report = fxprop.transform(model, 0.5, (X,))
    assert half["saving"] == report.totals.saving
    ratios = [d["backward"] / h["backward"] for d, h in zip(dense["steps"], half["steps"], strict=True)]
    assert half["speedup"]["backward"]["median"] == pytest.approx(sorted(ratios)[1])
    assert half["realised"] == pytest.approx((1 - 1 / sorted(ratios)[1]) / half["saving"])
    assert [site["name"] for site in half["sites"]] == ["0"]
    assert dense["saved_bytes"] == half["saved_bytes"] > X.nbytes
    text = str(found)
    for expected in ("whole step", "expected", "threads", "allocator", "torch", "layer by layer", "4/8"):
        assert expected in text


def test_measure_options():
    found = fxprop.measure(
        small(), 0.5, (X,), rounds=1, amp=torch.bfloat16, tuned=True, leaf_modules=("0",)
    )
    assert found.setting["amp"] == "bfloat16"
    assert found.setting["tuned"] is True
    with pytest.raises(InputError, match=r"measure got a Tensor on meta: expected real tensors"):
        fxprop.measure(small(), 0.5, (X.to("meta"),))
    with pytest.raises(InputError, match="no output of the model requires a gradient"):
        fxprop.measure(small().requires_grad_(False), 0.5, (X,))


def test_bench(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    command = ["bench", "resnet18", "--input", "2x3x64x64", "--rounds", "1", "-q", "--preset", "fast"]
    picture = tmp_path / "speed.svg"
    assert main([*command, "--keep", "0.25", "0.05", "--format", "json", "--plot", str(picture)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"] == "resnet18"
    assert [variant["name"] for variant in data["variants"]] == [
        "dense",
        "keep 0.25, fast",
        "keep 0.05, fast",
    ]
    assert "<svg" in picture.read_text()
    cache = tmp_path / "tune.json"
    options = ["--channels-last", "--threads", "2", "--tune", "--tune-cache", str(cache), "--sites"]
    assert main([*command, *options, "--keep", "0.1", "--format", "markdown"]) == 0
    assert "| dense " in capsys.readouterr().out
    assert "channels_last" in cache.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:7"], "torch sees no GPU here"),
        (["--preset", "fast", "--policy", "x.toml"], "--policy and --preset given"),
        (["--keep", "half"], "--keep half: expected a number"),
    ],
)
def test_bench_refuses(capsys, options, message):
    if "cuda:7" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["bench", "resnet18", *options]) == 1
    assert message in capsys.readouterr().err


def test_plot_refuses(tmp_path):
    found = fxprop.measure(small(), 0.5, (X,), rounds=1)
    by_k = fxprop.measure(small(), fxprop.Policy(k=2), (X,), rounds=1)
    with pytest.raises(ReportError, match="nothing to draw over keep"):
        plot({"small": by_k}, tmp_path / "a.svg")
    with pytest.raises(ReportError, match="cannot write the picture"):
        plot({"small": found}, tmp_path / "no" / "a.svg")
