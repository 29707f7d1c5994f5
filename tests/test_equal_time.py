"""The benchmark of learning per time: its clock, its statistics, its pairs, and that it goes on."""

import functools
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from test_examples import tiny_mnist  # noqa: F401
from torch import nn

import fxprop

FILE = Path(__file__).parents[1] / "examples" / "benchmarks" / "equal_time.py"
spec = importlib.util.spec_from_file_location("equal_time", FILE)
equal_time = importlib.util.module_from_spec(spec)
spec.loader.exec_module(equal_time)
results, tasks, train = equal_time.results, equal_time.tasks, equal_time.train
methods = sys.modules["learning.methods"]


def tiny():
    torch.manual_seed(0)
    images = tasks.Images(torch.randint(0, 256, (40, 1, 4, 4)).byte(), torch.arange(40) % 3)
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    return tasks.Task("tiny", make, images, images.first(10), images.first(20), "sgd")


def setting(task):
    batches = [task.examples(8)] * 2
    return methods.Setting(batches, tasks.loss_of, lambda: 0.0, task.pretrained)


@pytest.fixture
def clock(monkeypatch):
    """A clock that is one second further at each look."""
    seconds = iter(range(10**6))
    monkeypatch.setitem(train.CLOCKS, "wall", lambda: float(next(seconds)))


def test_a_run_spends_its_budget_and_no_more(clock):
    found = train.run(tiny(), "dense", 20, lr=0.1, batch=8, seed=0, quiet=True)
    assert (found["steps"], found["spent"]) == (20, 20)  # one second each, and evaluation takes none
    assert [round(point[0]) for point in found["curve"]] == [8, 12, 14, 16, 18, 20]
    assert found["kept"] == [1.0] * 4
    assert found["curve"][-1][2] == pytest.approx(found["test"][0])


def test_the_learning_rate_ends_with_the_budget():
    assert train.rate_at(0) < 0.03
    assert train.rate_at(0.05) == pytest.approx(1, abs=0.01)
    assert train.rate_at(0.525) == pytest.approx(0.46, abs=0.01)
    assert train.rate_at(1) == 0
    assert train.rate_at(1.1) == 0


def test_methods_of_a_seed_see_the_same(clock):
    """The policy that leaves all dense learns what plain PyTorch learns, to the bit."""
    runs = [
        train.run(tiny(), name, 9, lr=0.1, batch=8, seed=3, quiet=True) for name in ("dense", "all-dense")
    ]
    assert runs[0]["test"] == runs[1]["test"]
    other = train.run(tiny(), "dense", 9, lr=0.1, batch=8, seed=4, quiet=True)
    assert other["test"] != runs[0]["test"]


def test_warming_up_teaches_nothing():
    task = tiny()
    torch.manual_seed(0)
    method = methods.METHODS["examples-auto-late"](task.make_model(), setting(task))
    before = [p.clone() for p in method.module.parameters()]
    train.warm_up(method, task, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, method.module.parameters(), strict=True))
    assert all(p.grad is None for p in method.module.parameters())
    scheduler = fxprop.KeepScheduler(method.module, examples=lambda step: "auto")
    assert scheduler.state_dict()["examples"] == {"spread": None, "rested": 0}


def test_dense_ends_of_a_budget():
    made = methods.METHODS["channel-25-ends"](tiny().make_model(), setting(tiny()))
    dense = []
    for done in (0.0, 0.19, 0.2, 0.89, 0.9, 1.0):
        made.at(done)
        dense.append(all("k" not in node.kwargs for node in made.module.graph.nodes))
    assert dense == [True, True, False, False, True, True]


def test_frozen_parts_get_no_gradient():
    model = methods.METHODS["frozen-2"](tasks.GlyphNet(3), setting(tiny())).module
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "stage1"}
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = train.optimizer_of(tiny(), model, 0.1)
    model(torch.randn(4, 1, 32, 32)).sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not {name for name in moved if name.split(".")[0] in frozen}


def test_a_new_head_is_trained_alone_before_the_plan(monkeypatch):
    trained = []
    monkeypatch.setattr(
        fxprop,
        "recommend",
        lambda gm, *_, **__: trained.append([p.requires_grad for p in gm.parameters()]) or "Net: dense",
    )
    model = tasks.GlyphNet(3)
    made = methods.METHODS["recommended"](model, setting(tasks.starting_from(tiny(), {})))
    names = [name for name, p in made.module.named_parameters() if p.requires_grad]
    assert names == ["head.weight", "head.bias"]
    made.at(0.05)
    assert not trained
    made.at(0.1)
    assert all(trained[0])


def test_planning_is_no_part_of_the_budget(clock, monkeypatch):
    def recommend(gm, batches, loss, freeze):
        assert loss(gm, batches[0]).requires_grad
        for _ in range(100):
            train.CLOCKS["wall"]()
        return f"Net: all that pays, freeze={freeze}"

    monkeypatch.setattr(fxprop, "recommend", recommend)
    for task, remark in (
        (tiny(), "all that pays, freeze=False"),
        (tasks.starting_from(tiny(), {}), "all that pays, freeze=True"),
    ):
        found = train.run(task, "recommended", 20, lr=0.1, batch=8, seed=0, quiet=True)
        assert (found["remark"], found["planning"]) == (remark, 101)
        # in fine-tuning the plan is made in the third step, which looks at the clock twice more
        assert found["spent"] == 20
        assert found["steps"] in (19, 20)


def test_plans_after_some_steps():
    *texts, last = equal_time.plan.plan(tiny(), [0, 3], lr=0.1, batch=8, batches=2)
    assert [text.partition("\n")[0] for text in texts if "\n" in text] == [
        f"tiny after {steps} dense steps of 8" for steps in (0, 3)
    ]
    assert last.startswith("examples-50: cosine 0.")


def test_text_is_predicted_from_the_left():
    text = tasks.Text(torch.arange(23), 5)
    x, y = next(text.all())
    assert torch.equal(y[:, :-1], x[:, 1:])
    assert x.flatten().tolist() == list(range(20))
    x, y = next(text.stream(4, torch.Generator().manual_seed(0)))
    assert torch.equal(y - x, torch.ones_like(x))


def test_a_gpt_sees_no_later_character():
    torch.manual_seed(0)
    model = tasks.CharGPT(10, 6, width=8, depth=1, heads=2)
    ids = torch.arange(6)[None]
    before = model(ids)
    ids[0, 4] = 9
    after = model(ids)
    assert torch.allclose(before[0, :4], after[0, :4], atol=1e-6)
    assert not torch.allclose(before[0, 4:], after[0, 4:], atol=1e-6)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_student(degrees, quantile):
    assert results.student_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-3)
    assert results.student_below(-quantile, degrees) == pytest.approx(0.025, abs=1e-5)


def test_pairs():
    mean, half, p = results.paired([1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 2.5, 3.0])
    assert mean == 0.75
    assert half == pytest.approx(3.1824 * 0.5 / math.sqrt(3) / 2, abs=1e-3)
    assert p == pytest.approx(0.0138, abs=1e-3)
    assert results.paired([1.0, 2.0], [1.0, 2.0]) == (0, 0, 1)
    assert math.isinf(results.paired([1.0], [2.0])[1])


def test_time_to_a_loss():
    run = {"budget": 10, "curve": [(4, 1, 1.0, 0), (6, 2, 0.5, 0), (10, 3, 0.4, 0)]}
    assert results.time_to(run, 0.75) == pytest.approx(0.5)
    assert results.time_to(run, 1.5) == 0.4
    assert results.time_to(run, 0.3) is None


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command_goes_on_where_it_was(tiny_mnist, tmp_path, capsys, monkeypatch, threads):  # noqa: F811
    monkeypatch.setattr(tasks, "GlyphNet", functools.partial(tasks.GlyphNet, width=8))
    out = tmp_path / "runs" / "a.jsonl"
    arguments = ["glyphs", "--data", str(tiny_mnist), "--out", str(out), "--threads", "1"]
    arguments += ["--methods", "dense", "channel-25", "--tuned", "dense", "--budgets", "0.01", "--quiet"]
    arguments += ["--lr", "0.01", "0.02", "--batch", "4", "--seeds", "2", "--plot", str(tmp_path / "a.svg")]
    equal_time.main(arguments)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["method"], r["grid"]) for r in lines] == [("dense", True)] * 2 + [
        ("dense", False), ("channel-25", False)
    ] * 2  # fmt: skip
    assert "validation" in lines[0]
    assert "test" not in lines[0]  # no choice is made by the test data
    best = min(lines[:2], key=lambda r: r["validation"][0])["lr"]
    assert {r["lr"] for r in lines[2:]} == {best}
    first = capsys.readouterr().out
    assert "channel-25" in first.partition("| task")[2]
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    monkeypatch.setattr(train, "run", None)  # nothing is left to run
    out.write_text(out.read_text() + '{"task": "gly')  # of a process that was killed
    equal_time.main(arguments)
    assert capsys.readouterr().out.partition("| task")[2] == first.partition("| task")[2]
