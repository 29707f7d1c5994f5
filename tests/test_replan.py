"""KeepScheduler with `replan`: a plan every few hundred steps, and the last one in a checkpoint."""

import json
from unittest.mock import Mock

import pytest
import torch
from test_fidelity import loss, make_mlp
from test_recommend import batches, make_mixing, make_net, speeds  # noqa: F401

import fxprop
from fxprop import schedules
from fxprop.errors import InputError, PolicyError
from fxprop.pipeline.recipe import recipe_of
from fxprop.training import candidates
from fxprop.training import replan as replanning


def scheduled(make=make_net, given=None, keep=1.0, **options):
    gm, _ = fxprop.transform(make(), keep, (batches()[0][0],))
    replan = schedules.Replan(given or batches(4), loss, **{"every": 3, "first": 1, "rounds": 1, **options})
    return gm, fxprop.KeepScheduler(gm, replan=replan)


def steps(scheduler, count):
    """Which of them made a plan."""
    made = []
    for _ in range(count):
        before = scheduler.get_last_plan()
        scheduler.step()
        if scheduler.get_last_plan() is not before:
            made.append(scheduler.last_step)
    return made


def test_plans_are_made_when_they_are_due(monkeypatch):
    monkeypatch.setattr(replanning, "find_plan", lambda *_, **__: Mock(best=Mock(frozen=frozenset())))
    _, scheduler = scheduled(make_mixing)
    assert scheduler.get_last_plan() is None
    assert steps(scheduler, 9) == [1, 4, 7]
    _, scheduler = scheduled(make_mixing, first=0, every=5)
    assert scheduler.get_last_plan() is not None
    assert steps(scheduler, 9) == [5]


def test_a_plan_is_that_of_recommend(speeds):  # noqa: F811
    speeds["channels"] = 100.0
    gm, scheduler = scheduled()
    assert "fxprop" not in gm.code
    scheduler.step()
    other, _ = fxprop.transform(make_net(), 1.0, (batches()[0][0],))
    plan = fxprop.recommend(other, batches(4), loss)
    assert scheduler.get_last_plan().policy == plan.policy
    assert gm.code == other.code
    assert "fxprop" in gm.code


def test_the_next_plan_may_be_another(speeds):  # noqa: F811
    gm, scheduler = scheduled(freeze=True)
    speeds["frozen"] = 100.0
    scheduler.step()
    frozen = {name for name, p in gm.named_parameters() if not p.requires_grad}
    assert frozen == scheduler.get_last_plan().best.frozen != set()
    speeds["frozen"] = 1.0
    steps(scheduler, 3)
    assert all(p.requires_grad for p in gm.parameters())


def test_what_was_timed_is_not_timed_again(monkeypatch):
    timed = []
    measure = candidates.StepClock._measure

    def counting(clock, policy, frozen):
        timed.append((policy, frozen))
        return measure(clock, policy, frozen)

    monkeypatch.setattr(candidates.StepClock, "_measure", counting)
    given = [(x.float(), y) for x, y in batches(2)]
    gm, _ = fxprop.transform(make_net().float(), 1.0, (given[0][0],))
    replan = schedules.Replan(given, loss, every=1, first=0, rounds=1)
    scheduler = fxprop.KeepScheduler(gm, replan=replan)
    first = len(timed)
    scheduler.step()
    again = [policy for policy, _ in timed[first:]]
    assert first > 0
    assert {policy.examples for policy in again} <= {"auto"}


def test_a_checkpoint_has_the_plan_and_nothing_is_measured(speeds, monkeypatch):  # noqa: F811
    speeds.update(frozen=100.0, auto=100.0, least=200.0)
    gm, scheduler = scheduled(freeze=True)
    before = scheduler.state_dict()
    assert before["plan"] is None
    steps(scheduler, 2)
    loss(gm, batches()[0]).backward()
    state = json.loads(json.dumps({n: v for n, v in scheduler.state_dict().items() if n != "examples"}))
    state["examples"] = scheduler.state_dict()["examples"]
    again, resumed = scheduled(freeze=True)
    monkeypatch.setattr(candidates.StepClock, "speed", None)
    resumed.load_state_dict(state)
    assert recipe_of(again).in_force == recipe_of(gm).in_force
    assert recipe_of(again).in_force.examples == "auto"
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in gm.parameters()]
    assert not all(p.requires_grad for p in again.parameters())
    assert again.code == gm.code
    assert resumed.last_step == 2
    resumed.load_state_dict(before)
    assert resumed.last_step == 0


def test_a_policy_stays_until_the_first_plan(speeds):  # noqa: F811
    gm, scheduler = scheduled(keep=fxprop.Policy(keep=0.5, when="always"), first=2)
    code = gm.code
    steps(scheduler, 1)
    assert gm.code == code
    steps(scheduler, 1)
    assert gm.code != code  # dense, as nothing pays


def test_batches_are_drawn_anew_and_the_random_state_stays(speeds):  # noqa: F811
    drawn = []
    x, y = batches(1, 64)[0]

    def few():
        drawn.append(len(drawn))
        yield from batches(6)

    _, scheduler = scheduled(make_mixing, given=few, count=3)
    steps(scheduler, 4)
    assert drawn == [0, 1]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
    _, scheduler = scheduled(make_mixing, given=loader)
    state = torch.get_rng_state()
    steps(scheduler, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failure_leaves_the_plan_before(speeds):  # noqa: F811
    speeds["frozen"] = 100.0
    given = batches(4)
    gm, scheduler = scheduled(given=lambda: given, freeze=True)
    scheduler.step()
    code, trained = gm.code, [p.requires_grad for p in gm.parameters()]
    del given[1:]
    with pytest.raises(InputError, match="got 1 of at least two mini-batches"):
        steps(scheduler, 3)
    assert gm.code == code
    assert [p.requires_grad for p in gm.parameters()] == trained


def test_a_budget_goes_with_it(speeds):  # noqa: F811
    gm, scheduler = scheduled(make_mixing, budget=0.7, budget_of="flops")
    scheduler.step()
    assert scheduler.get_last_plan().budget.cost <= 0.7
    assert recipe_of(gm).report(True).totals.saving >= 0.3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "Replan: every=0: expected an integer of at least 1"),
        ({"first": -1}, "Replan: first=-1: expected an integer of at least 0"),
        ({"count": 1}, "Replan: count=1: expected an integer of at least 2"),
        ({"rounds": True}, "Replan: rounds=True: expected an integer of at least 1"),
        ({"given": iter([])}, "batches is a list_iterator, which can be gone through once only"),
    ],
)
def test_what_it_cannot_be(options, match):
    with pytest.raises(PolicyError, match=match):
        scheduled(**options)


def test_what_it_does_not_go_with(monkeypatch):
    gm, _ = fxprop.transform(make_mlp(), 0.5, (batches()[0][0],))
    replan = schedules.Replan(batches(), loss)
    for others in (
        {"schedule": schedules.Constant(0.5)},
        {"keep_weight": schedules.Constant(0.5)},
        {"examples": schedules.Constant(0.5)},
    ):
        with pytest.raises(PolicyError, match="replan and a schedule both given"):
            fxprop.KeepScheduler(gm, replan=replan, **others)
    with pytest.raises(PolicyError, match=r"replan=300: expected an fxprop\.schedules\.Replan"):
        fxprop.KeepScheduler(gm, replan=300)
    with pytest.raises(PolicyError, match="a backend's graphs are made once"):
        fxprop.KeepScheduler(fxprop.backend(fxprop.Policy(keep=0.5)), replan=replan)
    with pytest.raises(InputError, match="budget=2: expected a number with 0 < budget <= 1"):
        schedules.Replan(batches(), loss, budget=2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(PolicyError, match="each of several processes would plan by its own clock"):
        fxprop.KeepScheduler(gm, replan=replan)
