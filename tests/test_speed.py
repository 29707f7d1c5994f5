"""The cost model, tuning, measuring, and `fxprop bench`. What is timed here is never judged by its speed."""

import copy
import json

import predictions
import pytest
import torch
import torchvision
from models import IMAGES as X
from models import small
from torch import nn

import fxprop
from fxprop.cli.main import main
from fxprop.errors import InputError, ModelError, ReportError
from fxprop.pipeline.recipe import recipe_of
from fxprop.plan.decisions import Sparsity, Timing
from fxprop.policy import cost_model as cost
from fxprop.policy import machine as machines
from fxprop.policy import step_time
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


@pytest.mark.short
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


# --- what to expect of the whole step ----------------------------------------------------------------------


def clock_of(name="resnet18", policy=0.25, batch=8, **options):
    with torch.device("meta"):
        model, images = torchvision.models.get_model(name), torch.empty(batch, 3, 224, 224)
    return fxprop.estimate(model, policy, (images,), **options)


# of the guide's tables, in their order; the second was fitted to its table, the third measured
GUIDES_MACHINES = [
    machines.USUAL,
    machines.Machine("Zen 5", 23.0, 0.447, 0.354, 7.1),
    machines.Machine("Zen 4", 45.1, 0.912, 0.943, 13.2),
]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_expected_times_are_near_the_measured_ones_of_the_guide(name, nth, pytestconfig, monkeypatch):
    here = GUIDES_MACHINES[nth - 1]
    monkeypatch.setattr(step_time, "machine", lambda: here)
    monkeypatch.setattr(cost, "machine", lambda: here)
    page = pytestconfig.rootpath / "examples" / "guide" / "speed.md"
    measured = predictions.read(page, [0.25, 0.05], nth)
    for keep in (0.25, 0.05):
        clock = predictions.expect(name, predictions.exact(keep), 8, 224)
        assert clock.machine == here.name
        for expected, found in zip((clock.backward, clock.step), measured[name, keep], strict=True):
            assert 0.75 < expected / found < 1.25


def test_every_form_says_what_to_expect(tmp_path):
    report = clock_of()
    clock = report.clock
    assert clock.basis == "predicted"
    assert 1 < clock.step < clock.backward < 1 / (1 - report.totals.saving)
    said = f"backward {clock.backward:.1f}x, whole step {clock.step:.1f}x"
    assert said in " ".join(report.to_text().split())
    assert said in report.to_markdown()
    assert said in report.to_html()
    assert f"predicted step {clock.step:.1f}x as fast</title>" in report.to_html()
    assert said in report._repr_html_()
    assert json.loads(report.to_json())["clock"] == clock.to_dict()
    report.plot(tmp_path / "savings.svg")
    assert "predicted" in (tmp_path / "savings.svg").read_text()
    for text in (report.to_text(), report.to_html()):
        assert "examples/guide/choosing.md" in text


def test_more_is_expected_of_less():
    clocks = [clock_of(policy=keep).clock for keep in (0.5, 0.25, 0.05)]
    assert clocks[0].backward < clocks[1].backward < clocks[2].backward
    assert clocks[0].step < clocks[1].step < clocks[2].step < 3


def test_where_nothing_is_left_out_nothing_is_expected():
    report = clock_of(policy=1.0)
    assert report.clock is None
    assert "clock" not in report.to_text()
    tiny = fxprop.estimate(small(), fxprop.Policy(keep=0.5, when="always"), (X,))
    assert tiny.clock is None
    assert "Layers this small are not predicted on the clock" in tiny.to_text()


def test_what_was_timed_stands_in_place_of_the_prediction(monkeypatch):
    monkeypatch.setattr(tuning, "time_site", lambda *_: SiteTimes(dense=4.0, sparse=1.0))
    wide, x = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 64)), torch.empty(512, 1024)
    gm, before = fxprop.transform(wide, 0.25, (x,))
    report = fxprop.tune(gm, (x,))
    assert (before.clock.basis, before.clock.layers_measured) == ("predicted", 0)
    assert (report.clock.basis, report.clock.layers_measured) == ("measured", 1)
    assert 2 < report.clock.backward < 4  # all but the dense output layer, which is small, was timed at 4x
    assert "1 layers timed on this machine's cpu" in " ".join(str(report).split())


def test_a_timed_layer_counts_by_hand():
    """Two layers whose sizes the model knows: the unit is fitted to the seconds of the dense one."""
    site = next(d for d in plan_of().rewritten)
    other_units = step_time._layer(plan_of().decisions[-1], machines.USUAL).dense
    timing = Timing(dense=2.0, sparse=0.5, device="cpu", wins=True)
    units = step_time._layer(site, machines.USUAL).dense
    clock = step_time.predict(plan_of(), 0, measured=lambda d: timing if d is site or d == site else None)
    assert clock.backward == pytest.approx((units + other_units) / (units / 4 + other_units))


def plan_of():
    """Of a wide layer, and a dense output layer."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 64))
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=0.25, when="always"), (torch.empty(512, 1024),))
    return recipe_of(gm).plans[True]


def test_half_of_the_examples_is_about_half_of_the_backward():
    plan = plan_of()
    whole, half = step_time.predict(plan, 0), step_time.predict(plan, 0, examples=(1, 2))
    assert 1 / half.backward == pytest.approx(0.5 / whole.backward + 0.1)


def test_bench_says_what_was_expected():
    measured = fxprop.measure(
        nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 64)), 0.25, (torch.randn(512, 1024),), rounds=2
    )
    clock = measured.variants[1].clock
    assert f"{clock.backward:.1f}x / {clock.step:.1f}x" in str(measured)
    assert [v["expected"] for v in measured.to_dict()["variants"]] == [None, clock.to_dict()]
    assert max(map(len, str(measured).splitlines())) <= 80


def test_one_tensor_is_as_good_as_a_tuple_of_it():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 4, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    measurement = fxprop.measure(model, fxprop.Policy(keep=0.25, when="always"), x, rounds=1, sites=True)
    assert len(measurement.variants) == 2
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=0.25, when="always"), x)
    assert tuning.conditions_of(gm, x) == tuning.conditions_of(gm, (x,))
    assert tuning.conditions_of(gm, x).channels_last
    fxprop.tune(gm, x, rounds=1)
    assert len(recipe_of(gm).measured) == 1
    with pytest.raises(InputError, match="example_inputs is a list"):
        fxprop.measure(model, 0.25, [x])
