"""Examples that are flattened, sliced, put together and moved: refused or right; and the formulas for it."""

import copy
import random

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_rows import assert_same, choice_of, differ, recorded
from torch import nn

import fxprop
from fxprop.compact.flattened import Flattened, Unknown
from fxprop.compact.rows import Rows

N = 6


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


STEPS = {
    "swap": lambda x, n: x.transpose(0, 1),
    "swap last": lambda x, n: x.transpose(1, 2),
    "flatten": lambda x, n: x.flatten(0, 1).unflatten(0, (-1, 2)),
    "regroup": lambda x, n: x.reshape(2, -1, x.shape[-1]),
    "examples first": lambda x, n: x.reshape(n, -1, x.shape[-1]),
    "behind": lambda x, n: torch.cat([x, x.sin()], 0),
    "beside": lambda x, n: torch.cat([x, x.cos()], 1),
    "first half": lambda x, n: x[: x.shape[0] // 2],
    "second half": lambda x, n: x.chunk(2, 0)[-1],
    "first n": lambda x, n: x[:n],
    "from n": lambda x, n: x[n:] if x.shape[0] > n else x,
    "half beside": lambda x, n: x[:, x.shape[1] // 2 :],
    "shift": lambda x, n: nn.functional.pad(x, (0, 0, 0, 0, 1, -1)),
    "shift beside": lambda x, n: nn.functional.pad(x, (0, 0, 1, -1)),
    "one more": lambda x, n: torch.cat([x, x[:, :1]], 1),
    "twice": lambda x, n: x.repeat_interleave(2, 0),
    "again": lambda x, n: x.repeat(2, 1, 1),
    "flip": lambda x, n: x.flip(0),
    "flip beside": lambda x, n: x.flip(1),
    "sum": lambda x, n: x.sum(1, keepdim=True) + x,
    "by halves": lambda x, n: x.unflatten(0, (2, -1)).flip(0).flatten(0, 1),
}


class Reshaped(nn.Module):
    """Some steps between two layers that take the last dimension; what is padded has no gradient."""

    def __init__(self, steps):
        super().__init__()
        self.a, self.b, self.steps = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), steps

    def forward(self, x):
        hidden = self.a(x).tanh()
        for step in self.steps:
            hidden = STEPS[step](hidden, x.shape[0])
        return self.b(hidden.reshape(-1, 4)).sin().view(hidden.shape)


def sources(model, x):
    """For each entry of the output, the examples it depends on: [..., N], as bools."""
    parts = []
    for example in range(N):
        shaken = x.detach().clone()
        shaken[example] += torch.rand_like(shaken[example]) + 0.1
        parts.append(model(shaken) != model(x))
    return torch.stack(parts, -1)


def steps_of(seed):
    draw = random.Random(seed)
    while True:
        steps = [draw.choice(list(STEPS)) for _ in range(draw.randint(1, 4))]
        model, x = Reshaped(steps).double(), torch.randn(N, 2, 4).double()
        try:
            output = model(x)
        except (RuntimeError, IndexError):
            continue  # shapes that do not fit
        if output.shape[-1] == 4 and output.numel():
            return steps


def gradients(model, x, grad):
    model.zero_grad()
    model(x).backward(grad)
    return {name: p.grad for name, p in model.named_parameters()}


def refused(steps):
    """Whether ours takes all examples; if not, its gradients have been compared."""
    torch.manual_seed(0)
    model, x = Reshaped(steps).double(), torch.randn(N, 2, 4).double()
    gm, report = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), (x,))
    output = model(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    if report.examples.off:
        assert_same(gradients(gm, x, grad), gradients(model, x, grad), 1e-12)
        return True
    with recorded(choice_of(gm)) as taken:
        ours = gradients(gm, x, grad)
    _, chosen, weights = taken[0]
    of = sources(model, x)
    assert (of.sum(-1) <= 1).all(), f"an output is of several examples, and {steps} were not refused"
    weight = torch.zeros(N).double().index_put((chosen,), weights.double())
    masked = gradients(model, x, grad * (of.double() @ weight))
    assert_same(ours, masked, 1e-9)
    dense = gradients(model, x, grad)
    assert differ(ours, dense) or not any(g.any() for g in dense.values())  # all may have been padded away
    return False


@pytest.mark.parametrize("seed", range(8))
def test_refused_or_right(seed):
    refused(steps_of(seed))


@pytest.mark.parametrize(
    "steps",
    [
        ["flatten"],
        ["swap"],
        ["behind", "first n"],
        ["behind", "second half"],
        ["beside", "half beside", "flip beside"],
        ["behind", "by halves", "regroup"],
        ["swap", "beside", "swap"],
    ],
)  # fmt: skip
def test_what_keeps_the_examples_is_not_refused(steps):
    assert not refused(steps)


# --- the formulas, against numbered examples

SYMBOL = sympy.Symbol("s0", integer=True, positive=True)
FACTORS = st.integers(1, 4)


def numbered(outer, inner, n=5):
    """The example of each entry of a dimension."""
    return torch.arange(n).repeat_interleave(inner).repeat(outer)


def size(outer, inner):
    return SYMBOL * outer * inner


def assert_numbers(rows, examples, n=5):
    assert torch.equal(examples, numbered(rows.outer, rows.inner, n))


@settings(max_examples=60, deadline=None)
@given(FACTORS, FACTORS, st.integers(0, 12), st.integers(1, 16), st.booleans())
def test_parts(outer, inner, first, count, by_blocks):
    entries = numbered(outer, inner)
    # whole blocks of n * inner, or n of something
    unit, unit_size = (5 * inner, SYMBOL * inner) if by_blocks else (5, SYMBOL)
    start, stop = first * unit, (first + count) * unit
    if stop > len(entries):
        return
    try:
        rows = Flattened(SYMBOL).sliced(
            Rows(0, outer, inner), size(outer, inner), first * unit_size, count * unit_size
        )
    except Unknown:
        assert not by_blocks
        return
    assert_numbers(rows, entries[start:stop])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FACTORS, FACTORS), min_size=1, max_size=3))
def test_joined(parts):
    given_parts = [(Rows(0, outer, inner), size(outer, inner)) for outer, inner in parts]
    try:
        rows = Flattened(SYMBOL).joined(given_parts)
    except Unknown:
        assert len({inner for _, inner in parts}) > 1
        return
    assert_numbers(rows, torch.cat([numbered(outer, inner) for outer, inner in parts]))


@settings(max_examples=100, deadline=None)
@given(FACTORS, FACTORS, FACTORS, FACTORS, st.sampled_from([1, 2, 3, 4, 6]), st.booleans())
def test_viewed(ahead, outer, inner, behind, split, at_front):
    """[ahead, outer * n * inner, behind], with a factor split off in front or behind."""
    n = 5
    whole = ahead * outer * inner * behind
    if whole % split:
        return
    ids = numbered(outer, inner)[None, :, None].expand(ahead, -1, behind)
    rest = sympy.Integer(whole // split) * SYMBOL
    after = (split, rest) if at_front else (rest, split)
    shapes = [(ahead, size(outer, inner), behind), after]
    symbolic = [[_Size(s) for s in shape] for shape in shapes]
    try:
        rows = Flattened(SYMBOL).viewed(symbolic[0], symbolic[1], Rows(1, outer, inner))
    except Unknown:
        return
    viewed = ids.reshape([int(sympy.sympify(s).subs(SYMBOL, n)) for s in after])
    along = viewed.movedim(rows.dim, 0).flatten(1)
    for column in along.unbind(1):
        assert_numbers(rows, column)


class _Size(torch.SymInt):
    """A size by its formula alone."""

    def __init__(self, formula):
        self.node = type("Node", (), {"expr": sympy.sympify(formula)})()
