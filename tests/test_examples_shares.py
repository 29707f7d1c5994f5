"""Copies, other shares, schedules, and learning on part of the mini-batch."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from kept_nets import N, Net, check, inputs, make, make_sparse, output_gradient
from kept_rows import SELECTS, assert_same, choice_of, gradients
from torch import nn

import fxprop
from fxprop import schedules
from fxprop.errors import PolicyError

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_copies_have_a_choice_of_their_own(again):
    model, gm, choice = make(Net(dropout=0.2), examples="auto")
    gm(inputs()).sum().backward()
    other = again(gm)
    theirs = choice_of(other)
    assert theirs is not choice
    assert theirs.spread == choice.spread is not None
    theirs.share = 0.5
    gm.zero_grad()
    check(model, other, theirs)
    assert gm.first.weight.grad is None
    assert choice.share == "auto"
    assert choice.last == (N, N)


def test_state_dict_is_that_of_the_model():
    model, gm, _ = make()
    gm(inputs()).sum().backward()
    buffer = io.BytesIO()
    torch.save(gm.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)
    x = inputs()
    assert torch.equal(model(x), gm(x))
    nn.init.zeros_(model.fc.weight)
    gm.load_state_dict(model.state_dict())
    assert torch.equal(model(x), gm(x))


def test_restore_gives_the_dense_model_back():
    model, gm, choice = make_sparse()
    dense = fxprop.restore(gm)
    x, grad = inputs(), output_gradient()
    assert_same(gradients(dense, [x], grad)[1], gradients(model, [x], grad)[1], 1e-12)
    assert fxprop.kept_examples(dense) is None
    assert dense.fc.weight is gm.fc.weight
    gm(x).backward(grad)
    assert choice.last == (N // 2, N)


def captured(function):
    """How many graphs torch.compile captures while `function` runs."""
    torch._dynamo.utils.counters.clear()
    function()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_another_share_or_mini_batch_compiles_nothing():
    _, gm, choice = make()

    def step(n=8):
        gm(inputs(n)).sum().backward()

    assert captured(step) > 0  # it can fail
    for share, k in [(0.25, 2), (0.75, 6), (1.0, None), (0.5, 4)]:
        report = fxprop.set_keep(gm, examples=share)
        assert (report.examples and report.examples.share) == (None if k is None else share)
        assert captured(step) == 0
        assert fxprop.kept_examples(gm) == choice.last == (None if k is None else (k, 8))
    fxprop.set_keep(gm, examples="auto")
    assert captured(step) == 0
    assert captured(lambda: step(12)) == 0


def test_a_keep_ratio_seen_before_compiles_nothing():
    _, gm, _ = make_sparse()

    def step():
        gm(inputs()).sum().backward()

    for keep in (0.5, 0.25):
        fxprop.set_keep(gm, keep)
        step()
    for keep in (0.5, 0.25, 0.5):
        fxprop.set_keep(gm, keep)
        assert captured(step) == 0


def test_channels_and_examples_are_set_apart():
    _, gm, choice = make_sparse()
    report = fxprop.set_keep(gm, 0.25)
    assert report.examples.share == 0.5
    assert "first" in {layer.name for layer in report.layers if layer.status == "rewritten"}
    gm(inputs()).sum().backward()
    assert choice_of(gm) is choice
    assert choice.last == (N // 2, N)
    report = fxprop.set_keep(gm, 0.5, examples=1 / 3)
    assert report.examples.share == 1 / 3
    gm(inputs()).sum().backward()
    assert fxprop.kept_examples(gm) == (2, N)
    report = fxprop.set_keep(gm, fxprop.Policy(keep=0.5))
    assert report.examples is None
    gm(inputs()).sum().backward()
    assert fxprop.kept_examples(gm) is None
    with pytest.raises(PolicyError, match="set_keep: give keep, keep_input, keep_weight or examples"):
        fxprop.set_keep(gm)


def lone_gradient(n=8):
    """Of one example alone."""
    return torch.zeros(n, 3, dtype=torch.float64).index_fill(0, torch.tensor([2]), 1.0)


def test_auto_follows_the_gradients_one_step_late():
    _, gm, _ = make(examples="auto", examples_least=0.25)
    kept = []
    for _ in range(3):
        gm(inputs(8)).backward(lone_gradient())
        kept.append(fxprop.kept_examples(gm))
    assert kept == [(8, 8), (2, 8), (2, 8)]


def test_what_auto_has_learnt_stays_while_all_examples_are_taken():
    _, gm, choice = make_sparse(examples="auto")
    gm(inputs(8)).backward(lone_gradient())
    spread = choice.state_dict()["spread"]
    fxprop.set_keep(gm, examples=1.0)
    fxprop.set_keep(gm, 0.25)
    fxprop.set_keep(gm, examples="auto")
    assert choice_of(gm).spread == spread


SHARES = schedules.Linear(1.0, 0.5, steps=4)


def test_schedule_of_examples(net):
    _, gm, _ = net
    scheduler = fxprop.KeepScheduler(gm, examples=SHARES)
    seen = []
    for _ in range(5):
        gm(inputs(8)).sum().backward()
        seen.append((scheduler.get_last_examples(), fxprop.kept_examples(gm)))
        scheduler.step()
    assert seen == [(1.0, None), (0.875, (7, 8)), (0.75, (6, 8)), (0.625, (5, 8)), (0.5, (4, 8))]
    assert scheduler.get_last_keep() == []


def test_dense_ends_around_auto(net):
    _, gm, _ = net
    schedule = schedules.Dense(schedules.Auto(), steps=5, first=0.4, last=0.2)
    scheduler = fxprop.KeepScheduler(gm, examples=schedule)
    seen = []
    for _ in range(6):
        gm(inputs(8)).sum().backward()
        seen.append((scheduler.get_last_examples(), fxprop.kept_examples(gm) is None))
        scheduler.step()
    # all gradients are of one size: the first call shows it, and the next needs no look
    assert seen == [(1.0, True)] * 2 + [("auto", False), ("auto", True)] + [(1.0, True)] * 2
    assert scheduler.state_dict()["last_examples"] == 1.0


def test_schedules_of_examples_and_channels_together():
    _, gm, _ = make_sparse()
    channels = schedules.Linear(1.0, 0.25, steps=4)
    scheduler = fxprop.KeepScheduler(gm, channels, examples=SHARES, levels=None)
    for step, kept in enumerate([None, (7, 8), (6, 8)]):
        gm(inputs(8)).sum().backward()
        assert fxprop.kept_examples(gm) == kept
        assert scheduler.get_last_keep() == [channels(step)]
        scheduler.step()


def test_state_of_a_schedule_of_examples():
    _, gm, _ = make()
    scheduler = fxprop.KeepScheduler(gm, examples=SHARES)
    scheduler.step(), scheduler.step()
    state = pickle.loads(pickle.dumps(scheduler.state_dict()))
    _, other, choice = make()
    again = fxprop.KeepScheduler(other, examples=SHARES)
    again.load_state_dict(state)
    assert (again.last_step, again.get_last_examples(), choice.share) == (2, 0.75, 0.75)
    again.step()
    assert choice.share == 0.625


def test_state_of_another_schedule_of_examples_is_refused(net):
    _, gm, _ = net
    state = fxprop.KeepScheduler(gm, examples=SHARES, last_step=2).state_dict()
    other = fxprop.KeepScheduler(gm, examples=schedules.Linear(1.0, 0.25, steps=4))
    with pytest.raises(PolicyError, match="checkpoint"):
        other.load_state_dict(state)


def test_state_of_auto_is_in_that_of_the_scheduler():
    _, gm, _ = make(examples="auto", examples_least=0.25)
    scheduler = fxprop.KeepScheduler(gm, schedules.Constant(1.0))
    gm(inputs(8)).backward(lone_gradient())
    state = scheduler.state_dict()
    assert state["examples"] == {"spread": pytest.approx(7), "rested": 0}
    _, other, _ = make(examples="auto", examples_least=0.25)
    fxprop.KeepScheduler(other, schedules.Constant(1.0)).load_state_dict(state)
    other(inputs(8)).backward(lone_gradient())
    assert fxprop.kept_examples(other) == (2, 8)


def test_what_is_no_schedule_of_examples(net):
    _, gm, _ = net
    with pytest.raises(PolicyError, match="schedule of 'examples' is 0.5: expected one of"):
        fxprop.KeepScheduler(gm, examples=0.5)
    with pytest.raises(PolicyError, match="no schedule given"):
        fxprop.KeepScheduler(gm)


def losses(module, optimizer, steps=60):
    """Of a task that is easy to learn."""
    x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = x[:, :3].argmax(1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("share", [0.5, "auto"])
def test_sgd_learns(share):
    _, gm, choice = make(examples=share)
    for choice.select in SELECTS:
        gm.load_state_dict(Net().double().state_dict())
        optimizer = torch.optim.SGD(gm.parameters(), 0.1, momentum=0.9)
        found = losses(gm, optimizer)
        assert found[-1] < 0.5 * found[0], choice.select
    k, n = fxprop.kept_examples(gm)
    assert n == 64
    assert k == 32 or share == "auto"


def test_adam_learns_and_shares_parameters_with_the_model():
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=1.0, examples=0.5), (inputs(),))
    found = losses(gm, optimizer)
    assert found[-1] < 0.5 * found[0]
    x = inputs()
    assert torch.equal(gm(x), model(x))
