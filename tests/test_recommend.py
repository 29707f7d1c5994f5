"""The recommended policy: what is taken for which speeds and progress, and that it stays in force."""

import json
import math
import tomllib
from dataclasses import replace

import pytest
import torch
from test_fidelity import HERE as FIDELITY
from test_fidelity import batches as unrelated
from test_fidelity import loss, make_float_mlp, make_mlp
from torch import nn

import fxprop
from fxprop.cli import main as cli
from fxprop.errors import InputError, ModelError
from fxprop.timing.layer_times import SiteTimes
from fxprop.training import candidates as planner

HERE = f"{__name__}:"


def batches(count=3, n=32):
    """With something to learn: a step on one mini-batch helps on the next."""
    return [(x, x[:, :3].argmax(1)) for x, _ in unrelated(count, n)]


def float_batches():
    return [(x.float(), y) for x, y in batches()]


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_mixing():
    """Its second half joins the examples."""

    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    return nn.Sequential(nn.Linear(5, 8), Centred(), nn.Linear(8, 3)).double()


@pytest.fixture
def speeds(monkeypatch):
    """Speeds by the kind of plan, in place of measured ones, and layers that all save time."""
    of = {"channels": 1.0, "auto": 1.0, "least": 1.0, "frozen": 1.0, "steadiness": 1.0}

    def speed(clock, policy, frozen=frozenset()):
        kind = "frozen" if frozen else "channels"
        if policy.examples != 1:
            kind = "auto" if policy.examples == "auto" else "least"
        return planner.Speed(of[kind], of[kind] * of["steadiness"])

    def site_times(gm, inputs, rounds):
        plan = planner.recipe_of(gm).plans[True]
        return [(d.site, d.sparsity, SiteTimes(2.0, 1.0)) for d in plan.rewritten]

    monkeypatch.setattr(planner.StepClock, "speed", speed)
    monkeypatch.setattr(planner, "site_times", site_times)
    return of


def planned(make=make_net, given=None, **options):
    given = given or batches()
    gm, _ = fxprop.transform(make(), 1.0, (given[0][0],))
    return gm, fxprop.recommend(gm, given, loss, **options)


def test_dense_where_nothing_pays(speeds):
    gm, plan = planned()
    assert plan.is_dense
    assert plan.best.name == "dense"
    assert "forward" not in vars(gm)  # as if it had never been asked
    assert plan.report.totals.saving == 0
    assert str(plan).startswith("Sequential: dense\n")
    json.loads(plan.to_json())


def test_channels_where_they_pay(speeds):
    speeds["channels"] = 100.0
    gm, plan = planned()
    assert "channels of" in plan.best.name
    worth = {c.name: c.worth for c in plan.tried}
    assert plan.best.worth == max(worth.values())
    assert plan.report.totals.saving > 0
    assert "fxprop" in gm.code
    # progress is that of fidelity under the policy that is now in force
    assert fxprop.fidelity(gm, batches(), loss).overall.progress == pytest.approx(plan.best.progress)
    fxprop.set_keep(gm, plan.policy)
    assert "taken" in str(plan)


def test_progress_decides_not_speed_alone(speeds):
    """Half of the speed that would pay for the least progress lost is too little."""
    _, plan = planned()
    most = max(c.progress for c in plan.tried if "channels" in c.name)
    assert 0 < most < 1
    speeds["channels"] = 0.99 / most
    assert planned()[1].is_dense
    speeds["channels"] = 1.2 / most  # more than dense, but no more than those promised that lost
    assert planned()[1].is_dense
    speeds["channels"] = 1.3 / most
    assert planned()[1].best.progress == pytest.approx(most)
    speeds["steadiness"] = 0.7  # a quarter of the rounds were so slow
    assert planned()[1].is_dense


def looks_at_all(gm):
    """How many examples "auto" sees, at one of eight calls at the latest."""
    for _ in range(8):
        loss(gm, batches()[0]).backward()
        if (kept := fxprop.kept_examples(gm)) is not None:
            return kept.n


def test_examples_where_they_save_time_and_cost_none(speeds):
    gm, plan = planned()
    assert not plan.policy.takes_examples  # saves nothing
    speeds["least"] = 1.5
    gm, plan = planned()
    assert plan.policy.examples == "auto"
    assert plan.best.name == "dense"
    assert not plan.is_dense
    assert looks_at_all(gm) == 32
    speeds["auto"] = 0.9
    assert planned()[1].is_dense  # costs more than it may


def test_examples_that_are_joined_are_left_together(speeds):
    speeds["least"] = 1.5
    _, plan = planned(make_mixing)
    assert plan.is_dense
    (row,) = [c for c in plan.tried if "auto" in c.name]
    assert "x - x.mean(0)" in row.why
    assert row.why in " ".join(str(plan).split())


def test_first_parts_are_left_out_only_when_asked(speeds):
    speeds["frozen"] = 100.0
    gm, plan = planned()
    assert plan.is_dense
    gm, plan = planned(freeze=True)
    frozen = {name for name, p in gm.named_parameters() if not p.requires_grad}
    assert frozen == plan.best.frozen
    assert frozen in ({"0.weight", "0.bias"}, {"0.weight", "0.bias", "2.weight", "2.bias"})
    assert "without the gradients of 0" in str(plan)


def test_a_plan_of_layers_goes_with_examples(speeds):
    speeds.update(frozen=3.0, auto=10.0, least=10.0)
    gm, plan = planned(freeze=True)
    assert plan.policy.examples == "auto"
    assert plan.best.frozen
    assert str(plan).partition("\n")[0].count(" with examples") == 1
    assert looks_at_all(gm) == 32
    grads = {name for name, p in gm.named_parameters() if p.grad is not None}
    assert grads == {name for name, _ in gm.named_parameters()} - plan.best.frozen


def test_examples_are_judged_beside_the_plan_that_is_taken(speeds):
    speeds.update(frozen=3.0, auto=3.0, least=3.6)  # 1.2x of the plan's speed: much against dense alone
    _, plan = planned(freeze=True)
    assert plan.best.frozen
    assert not plan.policy.takes_examples
    (row,) = [c for c in plan.tried if "auto" in c.name]
    assert row.speed == pytest.approx(1.0)
    assert "beside the plan that is taken" in row.why
    assert "1.20x as fast" in row.why
    speeds["least"] = 4.2
    assert planned(freeze=True)[1].policy.examples == "auto"


def test_examples_take_the_place_of_channels_where_both_together_do_not_pay(speeds, monkeypatch):
    judge, beside = planner.of_examples, []

    def of_examples(compared, clock, best):
        beside.append(best.name)
        return replace(judge(compared, clock, best), accepted=best.name == "dense")

    monkeypatch.setattr(planner, "of_examples", of_examples)
    speeds["channels"] = 100.0
    _, plan = planned()
    assert "channels of" in beside[0]
    assert beside[1:] == ["dense"]
    assert plan.best.name == "dense"
    assert plan.policy.examples == "auto"
    assert str(plan).startswith('Sequential: examples="auto"\n')
    # a budget may want the channels all the same
    assert planned(budget=0.5)[1].policy.examples != "auto"


def test_progress_of_a_prefix_is_that_of_the_rest(speeds):
    gm, plan = planned(freeze=True)
    row = next(c for c in plan.tried if c.name == "without the gradients of 0")
    full = fxprop.fidelity(gm, batches(), loss)
    total = full.overall.products.dense_next
    lost = full.rows[0].products.dense_next
    (bias,) = [p for name, p in gm.named_parameters() if name == "0.bias"]
    given = batches()
    grads = [torch.autograd.grad(loss(gm, batch), bias)[0] for batch in given]
    lost += sum((a @ b).item() for a, b in zip(grads, grads[1:] + grads[:1], strict=True))
    assert row.progress == pytest.approx((total - lost) / total)


def test_without_progress_of_dense_nothing_is_judged(speeds):
    speeds["channels"] = speeds["frozen"] = 100.0
    given = [(x, y) for x, y in batches(2)]
    given[1] = (given[0][0], (given[0][1] + 1) % 3)  # what helps on one mini-batch harms on the other
    _, plan = planned(given=given, freeze=True)
    assert plan.is_dense
    assert "makes no progress on another mini-batch either" in " ".join(str(plan).split())


def test_a_terminal_of_80_columns_shows_it_all(speeds):
    speeds.update(channels=3.0, auto=10.0, least=10.0)
    _, plan = planned(freeze=True)
    assert max(map(len, str(plan).splitlines()[1:])) <= 80
    whole = " ".join(str(plan).split())
    assert all(f"{c.name}: " in whole and c.why in whole for c in plan.tried if c.why)
    assert all(c.why in plan.render("github") for c in plan.tried)


def test_what_is_measured_changes_nothing():
    given = [(x.float(), y) for x, y in batches(2)]
    gm, _ = fxprop.transform(make_float_mlp(), 0.5, (given[0][0],))
    loss(gm, given[0]).backward()
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    grads, state = [p.grad.clone() for p in gm.parameters()], torch.get_rng_state()
    plan = fxprop.recommend(gm, given, loss, rounds=1, freeze=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(gm.parameters(), grads, strict=True))
    assert {name for name, p in gm.named_parameters() if not p.requires_grad} == plan.best.frozen
    assert all(c.speed > 0 and math.isfinite(c.progress) for c in plan.tried if not c.why)


def test_what_is_refused_changes_nothing(speeds):
    gm, _ = fxprop.transform(make_mlp(), fxprop.Policy(keep=0.5, when="always"), (batches()[0][0],))
    code = gm.code
    with pytest.raises(InputError, match="got 1 of at least two"):
        fxprop.recommend(gm, batches(1), loss)
    with pytest.raises(InputError, match="expected a tensor with one value"):
        fxprop.recommend(gm, batches(), lambda module, batch: module(batch[0]))
    with pytest.raises(ModelError, match="expected the module that fxprop.transform returned"):
        fxprop.recommend(make_mlp(), batches(), loss)
    assert gm.code == code


def test_a_failure_in_the_middle_leaves_no_choice_behind(speeds, monkeypatch):
    gm, _ = fxprop.transform(make_net(), 1.0, (batches()[0][0],))
    monkeypatch.setitem(speeds, "least", None)  # compared with a number: after examples were taken
    with pytest.raises(TypeError):
        fxprop.recommend(gm, batches(), loss)
    assert "forward" not in vars(gm)
    assert fxprop.kept_examples(gm) is None


def test_command(capsys, speeds):
    arguments = ["plan", f"{FIDELITY}make_float_mlp", "--input", "6x5"]
    speeds["least"] = 2.0
    assert cli.main([*arguments, "--batches", f"{HERE}float_batches"]) == 0
    assert 'examples="auto"' in capsys.readouterr().out.partition("\n")[0]
    assert cli.main([*arguments, "--batches", f"{HERE}float_batches", "--format", "toml"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["examples"] == "auto"
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "speeds alone, on random numbers" in out
    assert "pays where progress is above" in out


def test_shares_of_the_weights_alone_lose_less(speeds):
    gm, plan = planned()
    of = {c.name: c for c in plan.tried}
    (both,) = [
        c for name, c in of.items() if name.startswith("25%") and "2 of 2" in name and "alone" not in name
    ]
    (alone,) = [
        c for name, c in of.items() if "2 of 2 layers that save time, for the weights alone" in name
    ]
    assert both.progress < alone.progress < 1
    layers = fxprop.set_keep(gm, alone.policy).layers
    assert [(x.k_input, x.k_weight) for x in layers[:2]] == [(8, 2), (8, 2)]


# --- within a budget --------------------------------------------------------------------------------------


def test_a_budget_that_is_met_by_what_pays_changes_nothing(speeds):
    speeds["channels"] = 100.0
    _, free = planned()
    _, plan = planned(budget=0.5)
    assert plan.best.name == free.best.name
    assert len(plan.tried) == len(free.tried)
    assert (plan.budget.cost, plan.budget.pays) == (0.01, True)
    assert str(plan).endswith("Budget: 0.50 of a dense step's time; the plan costs 0.01.")


def test_past_what_pays_the_most_progress_per_second_is_taken(speeds):
    most = max(c.progress for c in planned()[1].tried if "channels" in c.name)
    speeds["channels"] = 0.95 / most  # dense is better
    _, free = planned()
    assert free.is_dense
    _, plan = planned(budget=0.99)
    assert "channels" in plan.best.name
    assert plan.best.worth == max(c.worth for c in plan.tried if "channels" in c.name)
    assert plan.budget.cost == pytest.approx(1 / speeds["channels"])
    assert str(plan).endswith("Without the budget it would not be taken.")
    assert json.loads(plan.to_json())["budget"]["pays"] is False


def test_less_and_less_is_tried_until_the_budget_is_met(speeds):
    speeds["least"] = 2.5
    gm, plan = planned(budget=0.4)
    names = [c.name for c in plan.tried]
    assert "50% of the examples" in names
    assert "25% of the examples" not in names  # the first of them met it
    assert (plan.best.name, plan.policy.examples) == ("50% of the examples", 0.5)
    loss(gm, batches()[0]).backward()
    assert fxprop.kept_examples(gm).k == 16


def test_a_budget_that_nothing_meets(speeds):
    speeds["channels"] = 1.25
    _, plan = planned(make_mixing, budget=0.1)
    assert "5% of the channels of all layers" in [c.name for c in plan.tried]
    assert not any("of the examples" in c.name for c in plan.tried)
    assert plan.best.speed == 1.25
    assert "the plan costs 0.80, and nothing that was tried costs less." in str(plan)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_a_budget_of_flops_is_that_of_the_report(speeds, share):
    _, plan = planned(budget=share, budget_of="flops")
    assert plan.budget.cost == pytest.approx(1 - plan.report.totals.saving)
    assert plan.budget.cost <= share
    assert "of a dense backward's FLOPs" in str(plan)


def test_first_parts_without_gradients_cost_no_flops(speeds):
    speeds["frozen"] = 100.0
    _, plan = planned(freeze=True, budget=0.9, budget_of="flops")
    assert plan.best.frozen
    dense = {layer.name: layer.dense.total for layer in plan.report.layers}
    frozen = {name.partition(".")[0] for name in plan.best.frozen}
    rest = sum(count for name, count in dense.items() if name not in frozen)
    assert plan.budget.cost == pytest.approx(rest / sum(dense.values()))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"budget": 0}, "budget=0: expected a number with 0 < budget <= 1"),
        ({"budget": True}, "budget=True: expected a number"),
        ({"budget": 0.5, "budget_of": "joules"}, "budget_of='joules': expected one of time, flops"),
    ],
)
def test_budgets_that_are_none(given, match):
    with pytest.raises(InputError, match=match):
        planned(**given)


def test_flops_that_were_not_counted(speeds):
    gm, _ = fxprop.transform(make_net(), 1.0)
    code = gm.code
    with pytest.raises(InputError, match="needs FLOPs, which are counted with example_inputs only"):
        fxprop.recommend(gm, batches(), loss, budget=0.5, budget_of="flops")
    assert gm.code == code


def test_a_budget_on_the_command_line(capsys, speeds):
    arguments = ["plan", f"{FIDELITY}make_float_mlp", "--input", "6x5", "--batches", f"{HERE}float_batches"]
    assert cli.main([*arguments, "--budget", "0.5", "--budget-of", "flops"]) == 0
    assert "Budget: 0.50 of a dense backward's FLOPs; the plan costs 0." in capsys.readouterr().out
    assert cli.main([*arguments, "--budget", "2"]) == 1
    assert "budget=2.0: expected a number with 0 < budget <= 1" in capsys.readouterr().err
