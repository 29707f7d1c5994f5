"""Code that keeps state between calls, or draws random numbers: every call of the rewritten module does so too."""

import itertools
import random
from collections import Counter, deque
from itertools import cycle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import (
    assert_behaves_like,
    assert_equal,
    names_the_line,
    seed,
    state_and_hooks_of,
    surroundings,
)
from models import MAY_RUN_AS_WRITTEN, POLICY, Cases, X, transform
from torch import nn

import fxprop
from fxprop.errors import TraceError

pytestmark = MAY_RUN_AS_WRITTEN

STATE, MADE = Cases(), Cases()


def buffer(name, value):
    return lambda net: net.register_buffer(name, value.clone())


def attribute(name, make):
    return lambda net: setattr(net, name, make())


# --- buffers, parameters and tensors held as attributes


@STATE(buffer("n", torch.zeros(())))
def counts_in_a_buffer(self, x):
    self.n += 1
    return self.body(x) * self.n


@STATE(buffer("n", torch.zeros(())))
def assigns_a_buffer_anew(self, x):
    self.n = self.n + x.detach().mean()
    return self.body(x) + self.n


@STATE(buffer("n", torch.zeros((), dtype=torch.long)))
def counts_only_in_training(self, x):
    if self.training:
        self.n.add_(1)
    return self.body(x) / (1 + self.n)


@STATE(buffer("mean", torch.ones(12)))
def keeps_a_running_mean(self, x):
    h = self.a(x)
    self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return self.o(torch.relu(self.b(h - self.mean)))


@STATE(buffer("mean", torch.ones(12)))
def keeps_a_running_mean_under_no_grad(self, x):
    h = self.a(x)
    with torch.no_grad():
        self.mean.lerp_(h.mean(0), 0.1)
    return self.o(torch.relu(self.b(h - self.mean)))


@STATE(buffer("mean", torch.ones(12)))
def writes_through_data(self, x):
    h = self.a(x)
    self.mean.data = 0.9 * self.mean.data + 0.1 * h.data.mean(0)
    return self.o(torch.relu(self.b(h - self.mean)))


def queue(net):
    net.register_buffer("queue", torch.zeros(3, 12))
    net.position = 0


@STATE(queue)
def fills_a_queue(self, x):
    h = self.a(x)
    self.queue[self.position] = h.detach().mean(0)
    self.position = (self.position + 1) % 3
    return self.o(self.b(h) + self.queue.sum(0))


def statistics(net):
    net.register_buffer("mean", torch.zeros(12))
    net.register_buffer("var", torch.ones(12))


@STATE(statistics)
def calls_batch_norm_as_a_function(self, x):
    return self.o(F.batch_norm(self.b(torch.relu(self.a(x))), self.mean, self.var, training=self.training))


@STATE()
def clamps_a_weight(self, x):
    with torch.no_grad():
        self.b.weight.clamp_(-0.1, 0.1)
    return self.body(x)


@STATE()
def scales_a_weight_through_data(self, x):
    self.o.weight.data.mul_(0.9)
    return self.body(x)


@STATE(attribute("t", lambda: torch.ones(())))
def counts_in_a_tensor_that_is_no_buffer(self, x):
    self.t.add_(1)
    return self.body(x) * self.t


@STATE(lambda net: net.register_buffer("table", None))
def makes_a_buffer_in_the_first_call(self, x):
    if self.table is None:
        self.table = torch.arange(6.0)
    return self.body(x + self.table)


@STATE()
def registers_a_buffer_in_the_first_call(self, x):
    if not hasattr(self, "table"):
        self.register_buffer("table", torch.arange(6.0), persistent=False)
    return self.body(x + self.table)


# --- Python values


@STATE(attribute("k", int))
def counts_in_python(self, x):
    self.k += 1
    return self.body(x) * self.k


@STATE(attribute("k", int))
def counts_without_using_it(self, x):
    self.k += 1
    return self.body(x)


@STATE(attribute("seen", list))
def appends_to_a_list(self, x):
    self.seen.append(tuple(x.shape))
    return self.body(x) * len(self.seen)


@STATE(attribute("seen", lambda: deque(maxlen=3)))
def appends_to_a_deque(self, x):
    self.seen.append(len(self.seen))
    return self.body(x) + sum(self.seen)


@STATE(attribute("calls", Counter))
def counts_in_a_dict(self, x):
    self.calls["train" if self.training else "eval"] += 1
    return self.body(x) * self.calls["train"]


@STATE(attribute("numbers", itertools.count))
def takes_the_next_of_an_iterator(self, x):
    return self.body(x) + next(self.numbers)


class Calls:
    def __init__(self):
        self.number = 0

    def one_more(self):
        self.number += 1
        return self.number


@STATE(attribute("calls", Calls))
def calls_an_object_that_counts(self, x):
    return self.body(x) / self.calls.one_more()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.total += x.detach().sum()
        return x * self.calls + self.total


@STATE(attribute("child", Counting))
def has_a_child_that_counts(self, x):
    return self.body(self.child(x))


@STATE(attribute("k", int))
def alternates(self, x):
    self.k = 1 - self.k
    return self.body(x) if self.k else self.o(self.a(x))


# --- random numbers

NOISE = Cases.of(
    X,
    adds_normal_noise=lambda self, x: self.body(x + torch.randn(6)),
    draws_one_number=lambda self, x: self.body(x) * torch.rand(()),
    draws_one_number_in_training=lambda self, x: self.body(x * (1 + torch.rand(1)) if self.training else x),
    permutes_features=lambda self, x: self.body(x[:, torch.randperm(6)]),
    draws_an_index=lambda self, x: self.body(x + torch.randint(0, 5, (6,))),
    fills_an_empty_tensor=lambda self, x: self.body(x + torch.empty(6).uniform_(-1, 1)),
    draws_from_a_distribution=lambda self, x: self.body(
        x + torch.distributions.Normal(0.0, 1.0).sample((6,))
    ),
    draws_by_python=lambda self, x: self.body(x) * random.random(),
    draws_by_numpy=lambda self, x: self.body(x) * float(np.random.rand()),
)


@NOISE()
def drops_out_a_mask(self, x):
    mask = F.dropout(torch.ones(12), 0.5, self.training)
    return self.o(torch.relu(self.b(self.a(x) * mask)))


@NOISE(attribute("generator", lambda: torch.Generator().manual_seed(5)))
def draws_from_its_own_generator(self, x):
    return self.body(x + torch.randn(6, generator=self.generator))


@NOISE(attribute("rng", lambda: np.random.default_rng(5)))
def draws_from_its_own_numpy_generator(self, x):
    return self.body(x) * self.rng.random()


@NOISE(attribute("rng", lambda: random.Random(5)))
def draws_from_its_own_python_generator(self, x):
    return self.body(x) * self.rng.random()


@NOISE()
def drops_a_layer_by_python(self, x):
    h = torch.relu(self.a(x))
    if not self.training or random.random() < 0.5:
        h = torch.relu(self.b(h))
    return self.o(h)


@NOISE()
def drops_a_layer_by_torch(self, x):
    h = torch.relu(self.a(x))
    if not self.training or torch.rand([]) < 0.5:
        h = torch.relu(self.b(h))
    return self.o(h)


@NOISE()
def drops_samples(self, x):
    h = torch.relu(self.a(x))
    if self.training:
        h = h * torch.empty(4, 1).bernoulli_(0.5) / 0.5
    return self.o(torch.relu(self.b(h)))


@NOISE()
def seeds_itself(self, x):
    torch.manual_seed(3)
    return self.body(x + torch.randn(6))


# --- tensors that the code makes, and writes to


@MADE()
def adds_into_zeros(self, x):
    return self.o(torch.zeros(3, 12).index_add_(0, torch.tensor([0, 1, 1, 2]), self.a(x)))


@MADE()
def writes_rows_of_zeros(self, x):
    h = torch.zeros(5, 12)
    h[1:] = self.a(x)
    return self.o(torch.relu(self.b(h)))


@MADE()
def multiplies_ones_in_place(self, x):
    return self.o(torch.ones(4, 12).mul_(self.a(x)))


@MADE()
def scatters_into_a_full_tensor(self, x):
    index = torch.arange(12).flip(0).expand(4, 12)
    return self.o(torch.full((4, 12), 0.5).scatter_(1, index, self.a(x)))


@MADE()
def copies_into_an_empty_tensor(self, x):
    return self.o(self.b(torch.empty(4, 12).copy_(self.a(x))))


@MADE()
def writes_to_an_output_argument(self, x):
    scale = torch.empty(6)
    torch.mul(torch.ones(6), 2.0, out=scale)
    return self.body(x * scale)


@MADE()
def collects_in_a_sum(self, x):
    total = torch.zeros(4, 12)
    for layer in (self.a, self.a):
        total += layer(x)
    return self.o(torch.relu(self.b(total)))


@MADE()
def returns_a_tensor_it_made(self, x):
    return self.body(x), torch.zeros(3)


ALL = STATE | NOISE | MADE


@pytest.mark.parametrize("name", ALL)
def test_every_call_does_what_the_model_would_and_the_model_given_stays(name):
    case = ALL[name]
    model = case.make()
    seed(7)
    before, around = state_and_hooks_of(model), surroundings()
    gm, _ = transform(model, *case.inputs)
    dense = fxprop.restore(gm)
    assert_equal(state_and_hooks_of(model), before, "the model")
    assert_equal(surroundings(), around, "around it")
    assert_behaves_like(gm, case.make(), case.inputs)
    if name not in STATE:  # whose state is the model's, and has gone on
        assert_behaves_like(dense, case.make(), case.inputs)


@pytest.mark.parametrize("name", STATE)
def test_in_eval_mode_and_restored(name):
    case = STATE[name]
    gm, _ = transform(case.make().eval(), *case.inputs)
    assert_behaves_like(fxprop.restore(gm), case.make(), case.inputs, modes=(False, True), steps=1)


@pytest.mark.parametrize(
    ("name", "look"), [*zip(ALL, cycle([fxprop.estimate, fxprop.layers]), strict=False)]
)
def test_looking_at_a_model_leaves_it_and_all_random_generators_alone(name, look):
    case = ALL[name]
    model = case.make()
    seed(7)
    before, around = state_and_hooks_of(model), surroundings()
    look(model, *([POLICY] if look is fxprop.estimate else []), case.inputs)
    assert_equal(state_and_hooks_of(model), before, "the model")
    assert_equal(surroundings(), around, "around it")


@pytest.mark.parametrize("name", ALL)
def test_symbolic_is_right_or_names_the_line(name):
    case = ALL[name]
    try:
        gm, report = transform(case.make(), *case.inputs, frontend="symbolic")
    except TraceError as error:
        refused = error
    else:
        assert report.to_dict()["frontend"] == "symbolic"
        assert_behaves_like(gm, case.make(), case.inputs, modes=(True, False), steps=2)
        return
    assert names_the_line(refused, case, Counting), refused


@pytest.mark.parametrize("name", MADE)
def test_what_was_returned_can_be_written_to(name):
    gm, _ = transform(MADE[name].make())
    first, again = gm(X), gm(X)
    first, again = (y[-1] if isinstance(y, tuple) else y for y in (first, again))
    with torch.no_grad():
        first.fill_(9.0)
    assert not (again == 9).any()
    assert_behaves_like(gm, MADE[name].make())
