"""Which examples are chosen: probabilities, draws, weights without bias, and what "auto" learns."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_rows import choice_of
from torch import nn

import fxprop
from fxprop.compact.choice import Choice, Chosen, Kept, inclusion, systematic
from fxprop.plan.batch import take_share

NORMS = torch.tensor([0.1, 3.0, 0.7, 1.0, 0.2, 5.0, 0.4, 0.9])
DRAWS = 2000
# standard errors: by chance one of 30 coordinates is beyond in 1 of 500 runs; runs are seeded
FAR = 4


@pytest.fixture(autouse=True)
def seeded():
    torch._dynamo.reset()
    torch.manual_seed(0)


NORMS_AND_COUNT = st.lists(st.floats(0, 2.0**40, width=32), min_size=1, max_size=40).flatmap(
    lambda norms: st.tuples(st.just(norms), st.integers(1, len(norms)))
)


def capped_by_hand(scores, k):
    """Probabilities in proportion to positive scores; those above 1 are set to 1 and the rest shared anew."""
    certain = set()
    while True:
        rate = (k - len(certain)) / sum(s for i, s in enumerate(scores) if i not in certain)
        above = {i for i, s in enumerate(scores) if i not in certain and s * rate > 1}
        certain |= above
        if not above or len(certain) == k:
            return [1.0 if i in certain else min(1.0, s * rate) for i, s in enumerate(scores)]


@settings(deadline=None)
@given(NORMS_AND_COUNT)
def test_probabilities_sum_to_k_and_follow_the_norms(case):
    norms, k = torch.tensor(case[0]), case[1]
    p = inclusion(norms, k)
    assert p.shape == norms.shape
    assert p.dtype == torch.float64
    assert bool((p > 0).all() and (p <= 1).all())
    assert float(p.sum()) == pytest.approx(k, rel=1e-6)
    assert bool((p[norms.argsort()].diff() >= -1e-12).all())


@settings(deadline=None)
@given(NORMS_AND_COUNT)
def test_probabilities_are_proportional_where_they_are_not_certain(case):
    # no norm is so small beside the largest that its probability is bounded from below
    norms, k = [norm + 2.0**21 for norm in case[0]], case[1]
    p = inclusion(torch.tensor(norms, dtype=torch.float64), k)
    assert p.tolist() == pytest.approx(capped_by_hand(norms, k), rel=1e-9)


def test_probabilities_of_a_few():
    torch.testing.assert_close(inclusion(NORMS, 2), NORMS.double() / NORMS.double().sum() * 2)
    assert inclusion(NORMS, len(NORMS)).eq(1).all()
    assert inclusion(torch.tensor([8.0, 1.0, 1.0]), 2).tolist() == [1.0, 0.5, 0.5]
    assert inclusion(torch.zeros(4), 2).tolist() == pytest.approx([0.5] * 4)
    assert inclusion(torch.tensor([3.0]), 1).tolist() == [1.0]


def test_an_example_without_gradient_is_drawn_hardly_ever():
    p = inclusion(torch.tensor([1.0, 0.0, 1.0, 0.0]), 2)
    assert p[0] == p[2] > 1 - 1e-5
    assert bool((p[1::2] > 0).all() and (p[1::2] < 1e-5).all())


def test_what_is_not_finite_is_kept_for_sure():
    norms = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 1.0, 1.0])
    p = inclusion(norms, 3)
    assert p[1] == p[3] == 1
    assert float(p.sum()) == pytest.approx(3)
    for _ in range(20):
        assert {1, 3} <= set(Choice(0.5).choose(norms, 3).examples.tolist())
    # more of them than places
    assert inclusion(torch.full((4,), float("nan")), 2).tolist() == pytest.approx([0.5] * 4)


@settings(deadline=None)
@given(NORMS_AND_COUNT)
def test_exactly_k_different_examples_are_drawn_in_order(case):
    norms, k = torch.tensor(case[0]), case[1]
    drawn = systematic(inclusion(norms, k), k)
    assert drawn.shape == (k,)
    assert bool((drawn.diff() > 0).all())
    assert 0 <= int(drawn[0]) <= int(drawn[-1]) < len(norms)


def far_from(p, expected):
    """How many standard errors the most deviating example is drawn too often or too rarely."""
    drawn = torch.cat([systematic(p, 3) for _ in range(DRAWS)])
    share = torch.bincount(drawn, minlength=len(p)) / DRAWS
    error = (expected * (1 - expected) / DRAWS).sqrt()
    return float(((share - expected).abs() / (error + 1e-9)).max())


def test_draws_have_their_probabilities():
    p = inclusion(NORMS, 3)
    assert far_from(p, p) < FAR
    assert far_from(p, inclusion(NORMS + 0.5, 3)) > FAR  # it can fail


def test_the_ways_of_choosing():
    top = Choice(0.5, "top").choose(NORMS, 3)
    assert top.examples.tolist() == [1, 3, 5]
    assert top.weights is None
    examples, weights = Choice(0.5, "random").choose(NORMS, 4)
    assert sorted(set(examples.tolist())) == examples.tolist()
    assert weights.tolist() == [2.0] * 4
    examples, weights = Choice(0.5, "importance").choose(NORMS, 3)
    torch.testing.assert_close(weights, 1 / inclusion(NORMS, 3)[examples])


def weighted_by(select, factor):
    """A choice whose weights are `factor` times as large; None: it gives none."""
    choice = Choice(0.5, select)
    right = choice.choose

    def choose(norms, k):
        examples, weights = right(norms, k)
        if weights is None:
            return Chosen(examples, None)
        return Chosen(examples, None if factor is None else weights * factor)

    choice.choose = choose
    return choice


def errors(draws, expected):
    """How many standard errors their mean is from what is expected: the most of any coordinate."""
    draws = torch.stack(draws)
    return float(((draws.mean(0) - expected).abs() / (draws.std(0) / len(draws) ** 0.5 + 1e-12)).max())


def error_of_mean(choice):
    """Of weighted sums of the kept."""
    values = NORMS[:, None].double() * (1 + 0.3 * torch.randn(len(NORMS), 10, dtype=torch.float64))
    draws = []
    for _ in range(DRAWS):
        examples, weights = choice.choose(NORMS, 4)
        kept = values[examples]
        draws.append((kept if weights is None else kept * weights[:, None]).sum(0))
    return errors(draws, values.sum(0))


@pytest.mark.parametrize("select", ["importance", "random"])
def test_weights_leave_the_mean_as_it_is(select):
    assert error_of_mean(weighted_by(select, 1.0)) < FAR


@pytest.mark.parametrize(
    ("select", "factor"),
    [("top", 1.0), ("importance", None), ("importance", 1.05), ("random", None), ("random", 1.05)],
)
def test_a_bias_is_seen(select, factor):
    assert error_of_mean(weighted_by(select, factor)) > FAR


def error_of_mean_gradient(choice, count=DRAWS):
    """Of the gradients of a transformed model."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, grad = torch.randn(8, 3).double(), NORMS[:, None] * (1 + 0.3 * torch.randn(8, 2)).double()
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=1.0, examples=0.5), (x,))
    parameters = list(model.parameters())
    dense = torch.cat([g.flatten() for g in torch.autograd.grad(model(x), parameters, grad)])
    choice_of(gm).choose = choice.choose
    draws = []
    for _ in range(count):
        found = torch.autograd.grad(gm(x), parameters, grad)
        draws.append(torch.cat([g.flatten() for g in found]))
    return errors(draws, dense)


@pytest.mark.parametrize("select", ["importance", "random"])
def test_the_mean_gradient_is_that_of_all_examples(select):
    assert error_of_mean_gradient(weighted_by(select, 1.0)) < FAR


@pytest.mark.parametrize(("select", "factor"), [("top", 1.0), ("importance", None), ("importance", 1.05)])
def test_a_bias_of_the_mean_gradient_is_seen(select, factor):
    assert error_of_mean_gradient(weighted_by(select, factor), DRAWS // 5) > FAR


@pytest.mark.parametrize(
    ("share", "n", "k"),
    [(0.5, 6, 3), (0.5, 7, 4), (0.25, 32, 8), (0.01, 32, 2), (0.5, 2, 2), (0.5, 1, 1), (1.0, 5, 5)],
)
def test_how_many(share, n, k):
    assert take_share(share, n) == Choice(share).count(n) == k
    assert Kept(k, n).share == k / n


def spread_of(norms):
    return float(norms.var(correction=0) / norms.mean() ** 2)


@pytest.mark.parametrize(
    ("spread", "settings", "k"),
    [
        (0.0, {}, 80),
        (0.05, {}, 80),  # 0.95 is nearest to 8 eighths
        (0.1, {}, 70),
        (0.3, {}, 60),
        (1.0, {}, 40),
        (3.0, {}, 20),
        (100.0, {}, 12),  # the least
        (100.0, {"least": 0.25}, 20),
        (100.0, {"least": 1.0}, 80),
        (3.0, {"factor": 2.0}, 40),
        (0.5, {"factor": 2.0}, 80),
        (1.0, {"factor": 0.5}, 20),
    ],
)
def test_auto_keeps_by_the_spread_in_eighths(spread, settings, k):
    assert Choice("auto", spread=spread, **settings).count(80) == k


def test_auto_learns_one_step_late():
    choice = Choice("auto")
    assert choice.count(80) == 80
    half = torch.tensor([0.0, 1.0]).repeat(40)
    choice.note(half)
    assert choice.spread is None
    assert choice.count(80) == 40
    assert choice.spread == pytest.approx(spread_of(half)) == 1.0


def test_auto_is_smoothed():
    choice = Choice("auto", spread=1.0)
    for after in (0.9, 0.81):
        choice.note(torch.ones(8))
        choice.count(8)
        assert choice.spread == pytest.approx(after)
    choice.note(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    choice.count(8)
    assert choice.spread == pytest.approx(0.9 * 0.81 + 0.1 * 3)


def test_auto_that_keeps_all_looks_at_one_call_in_eight():
    choice = Choice("auto")
    assert not choice.rests(), "nothing is known yet"
    choice.note(torch.ones(8))
    assert [choice.rests() for _ in range(10)] == [True] * 7 + [False] * 3, "until it has looked again"
    assert Choice("auto", spread=0.0, rested=choice.rested).rests() is False
    choice.note(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    choice.count(8)
    # what it sees stands for the seven that it did not see
    assert choice.spread == pytest.approx((1 - 0.9**8) * 3)
    assert not choice.rests()
    other = Choice("auto")
    other.load_state_dict({**choice.state_dict(), "spread": 0.0, "rested": 5})
    assert [other.rests() for _ in range(3)] == [True, True, False]


def test_what_needs_no_look_always_rests():
    assert all(Choice(1.0).rests() for _ in range(20))
    assert not Choice(0.5).rests()


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
@pytest.mark.parametrize("before", [None, 1.0])
def test_auto_passes_over_what_is_not_finite(norm, before):
    choice = Choice("auto", spread=before)
    choice.note(torch.tensor([1.0, norm]))
    choice.count(8)
    assert choice.spread == before


def test_auto_of_gradients_that_are_all_zero():
    choice = Choice("auto")
    choice.note(torch.zeros(8))
    assert choice.count(8) == 8
    assert choice.spread == 0


def test_what_auto_has_learnt_is_state():
    choice = Choice("auto")
    assert choice.state_dict() == {"spread": None, "rested": 0}
    choice.note(NORMS)
    state = choice.state_dict()
    assert state == {"spread": pytest.approx(spread_of(NORMS)), "rested": 0}
    other = Choice("auto")
    other.note(torch.ones(8))  # forgotten
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert other.state_dict() == state
    assert other.count(80) == choice.count(80) < 80


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_have_learnt_the_same_and_learn_by_themselves(again):
    choice = Choice("auto", "top", least=0.25, factor=2.0)
    choice.note(NORMS)
    other = again(choice)
    assert (other.share, other.select, other.least, other.factor) == ("auto", "top", 0.25, 2.0)
    assert other.spread == choice.spread == pytest.approx(spread_of(NORMS))
    other.note(torch.ones(8))
    assert other.state_dict()["spread"] == pytest.approx(0.9 * spread_of(NORMS))
    assert choice.state_dict()["spread"] == pytest.approx(spread_of(NORMS))
