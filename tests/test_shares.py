"""A share for each gradient: grad_input and grad_weight of what is kept for them, by hand and apart."""

import contextlib
import itertools

import oracle
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from masked import TOLERANCE, as_keep, assert_close, expected, mask_of, widest
from operators import OPERATORS
from torch import nn

from fxprop import ops
from fxprop.errors import OpError

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


def gradients(output, leaves, coefficients):
    """By name, None where nothing arrives."""
    tensors = {name: t for name, t in leaves.items() if isinstance(t, torch.Tensor)}
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    if not output.requires_grad:
        return dict.fromkeys(tensors)
    found = torch.autograd.grad(output, list(wanted.values()), coefficients, allow_unused=True)
    return dict.fromkeys(tensors) | dict(zip(wanted, found, strict=True))


def norms_of_features(operator, sample, leaves):
    """In the place of every entry of the product, the norm of the weight's entries that it is made of."""
    with torch.enable_grad():
        product = operator.product(sample.arranged(leaves), sample.constants)
    norms = torch.zeros(product.numel(), dtype=product.dtype)
    weight = leaves["weight"]
    for run in operator.features(torch.arange(product.numel()).view(product.shape), sample):
        for feature in range(run.shape[2]):
            places = run[..., feature].flatten()
            alone = torch.zeros(product.numel(), dtype=product.dtype)
            alone[places] = torch.rand(len(places), dtype=product.dtype)
            (of,) = torch.autograd.grad(product, weight, alone.view(product.shape), retain_graph=True)
            norms[places] = weight.detach()[of != 0].norm()
    return norms.view(product.shape)


def by_hand(operator, sample, leaves, coefficients, k_input, k_weight, **keywords):
    """Dense autograd twice, with the product's gradient masked for the one gradient, and for the other."""
    norm_grad, weighted = keywords.get("norm_grad", "full"), keywords.get("score_weight", False)
    larger = as_keep(max(k_input, k_weight, 1), keywords)
    found = expected(operator, sample, leaves, coefficients, larger, norm_grad)
    of_input = found
    if weighted:
        given = sample.arranged(leaves)
        with torch.enable_grad():
            product = operator.product(given, sample.constants)
            y = operator.biased(product, given, sample.constants).detach().requires_grad_()
            (grad,) = torch.autograd.grad(operator.after(y, given, sample.constants), y, coefficients)
        keep = as_keep(max(k_input, 1), keywords)
        scored = grad * norms_of_features(operator, sample, leaves)
        mask = mask_of(operator, sample, grad, keep, scored)
        of_input = expected(operator, sample, leaves, coefficients, keep, mask=mask)
    elif k_input:
        of_input = expected(operator, sample, leaves, coefficients, as_keep(k_input, keywords))
    found["input"] = of_input["input"] if k_input else None
    of_weight = None
    if k_weight:
        of_weight = expected(operator, sample, leaves, coefficients, as_keep(k_weight, keywords))
    found["weight"] = of_weight["weight"] if of_weight else None
    if "bias" in found and keywords.get("bias_grad", "full") == "selected":
        found["bias"] = of_weight["bias"] if of_weight else None
    return found


def check(operator, sample, dtype, k_input, k_weight, needs=(True, True, True), **keywords):
    leaves, others = sample.leaves(dtype, needs), sample.leaves(dtype, needs)
    k = max(k_input, k_weight, 1)
    output = operator.run(sample, leaves, k=k, k_input=k_input, k_weight=k_weight, **keywords)
    assert torch.equal(output, operator.run(sample, others))
    coefficients = sample.coefficients(output)
    found = gradients(output, leaves, coefficients)
    exact = sample.leaves(dtype, needs)
    for name, leaf in exact.items():
        if isinstance(leaf, torch.Tensor):
            exact[name] = leaf.detach().double().requires_grad_(leaf.requires_grad)
    wanted = by_hand(operator, sample, exact, coefficients.double(), k_input, k_weight, **keywords)
    names = set(found) & set(wanted) | {name for name, of in found.items() if of is not None}
    assert_close(*({name: of.get(name) for name in names} for of in (found, wanted)), TOLERANCE[dtype])


SHARES = [(1, 3), (3, 1), (0, 2), (2, 0), (2, 10**6), (10**6, 2), (0, 10**6)]


@every_operator
@pytest.mark.parametrize("select", ["channel", "element"])
def test_each_gradient_is_that_of_its_own_share(operator, select):
    for sample, (k_input, k_weight) in itertools.product(operator.samples[:4], SHARES):
        check(
            operator,
            sample,
            widest(operator),
            k_input,
            k_weight,
            **operator.supports.defaults(select=select),
        )


@every_operator
def test_every_setting_beside_shares(operator):
    sample, dtype = operator.samples[0], widest(operator)
    taken = {name: values for name, values in operator.supports.settings().items() if len(values) > 1}
    for name, values in taken.items():
        for value in values[1:]:
            for k_input, k_weight in ((1, 3), (3, 1)):
                check(
                    operator,
                    sample,
                    dtype,
                    k_input,
                    k_weight,
                    **operator.supports.defaults(**{name: value}),
                )


@every_operator
@pytest.mark.parametrize("shares", [(2, 2), (1, 3), (3, 1), (2, 0)])
def test_grad_input_may_rank_by_the_weights_as_well(operator, shares):
    for sample in operator.samples:
        keywords = operator.supports.defaults(score="l2", score_weight=True)
        if 0 in (*sample.input, *sample.constants.get("sizes", ())):
            continue
        with contextlib.suppress(oracle.Tie):  # any choice is right
            check(operator, sample, widest(operator), *shares, **keywords)


@every_operator
def test_sums_over_processes_rank_by_the_weights_alike(operator):
    """They are of squares; of one process the order is the same."""
    found = []
    for sync in (False, True):
        leaves = operator.samples[0].leaves(widest(operator))
        keywords = operator.supports.defaults(score="l2", score_weight=True, sync_selection=sync)
        output = operator.run(operator.samples[0], leaves, k=2, **keywords)
        found.append(gradients(output, leaves, operator.samples[0].coefficients(output)))
    assert_close(*found, TOLERANCE[widest(operator)])


@every_operator
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_shapes_and_shares_that_are_drawn(operator, data):
    sample = data.draw(operator.drawn)
    keywords = data.draw(operator.supports.drawn())
    # of all of the channels a region's parts are called one by one, which scores a part in another way
    keywords["score_fraction"] = 1.0
    if keywords.get("norm_grad") == "kept":
        keywords["norm_grad"] = "full"
    needs = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    # of an empty batch the dense operator's gradients are zeros
    least = 0 if all(sample.input) else 1
    k_input, k_weight = data.draw(st.integers(least, 5)), data.draw(st.integers(least, 5))
    try:
        check(operator, sample, widest(operator), k_input, k_weight, needs, **keywords)
    except oracle.Tie:
        reject()


@every_operator
def test_the_oracle_sees_one_more_in_either_share(operator):
    sample, dtype = operator.samples[0], widest(operator)
    leaves = sample.leaves(dtype)
    keywords = operator.supports.defaults()
    output = operator.run(sample, leaves, k=3, k_input=1, k_weight=3, **keywords)
    coefficients = sample.coefficients(output)
    found = gradients(output, leaves, coefficients)
    found = {name: of for name, of in found.items() if of is not None}
    right = by_hand(operator, sample, leaves, coefficients, 1, 3, **keywords)
    assert_close(found, right, TOLERANCE[dtype])
    for others, name in (((2, 3), "input"), ((1, 2), "weight"), ((3, 1), "weight")):
        wrong = by_hand(operator, sample, leaves, coefficients, *others, **keywords)
        with pytest.raises(AssertionError, match=f"{name}.*not close"):
            assert_close({name: found[name]}, {name: wrong[name]}, TOLERANCE[dtype])


@pytest.mark.parametrize(("k_input", "k_weight"), [(1, 2), (0.25, 0.5), (0.5, 1.0), (0.5, 0)])
def test_rows_have_a_share_for_each_gradient(k_input, k_weight):
    torch.manual_seed(0)
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (5, 6)))
    y = ops.linear(x, w, k=1, select="row", k_input=k_input, k_weight=k_weight)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, w), g, allow_unused=True)
    order = g.abs().sum(1).argsort(descending=True)

    def masked(k):
        count = k if isinstance(k, int) else int(4 * k)
        return g * torch.zeros(4, 1, dtype=g.dtype).index_fill(0, order[:count], 1)

    torch.testing.assert_close(found[0], masked(k_input) @ w)
    if k_weight == 0:
        assert found[1] is None
    else:
        torch.testing.assert_close(found[1], masked(k_weight).T @ x)


@pytest.mark.parametrize(("k_input", "k_weight"), [(0, 3), (3, 0), (0, 0)])
def test_what_drops_nothing_may_still_give_nothing(k_input, k_weight):
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((4, 6), (5, 6)))
    y, dense = ops.linear(x, w, k=1, select="nonzero", k_input=k_input, k_weight=k_weight), x @ w.T
    assert torch.equal(y, dense)
    if not (k_input or k_weight):
        assert not y.requires_grad
        return
    found = torch.autograd.grad(y.sum(), (x, w), allow_unused=True)
    wanted = torch.autograd.grad(dense.sum(), (x, w))
    for grad, of_dense, k in zip(found, wanted, (k_input, k_weight), strict=True):
        assert (grad is None) == (k == 0)
        if grad is not None:
            torch.testing.assert_close(grad, of_dense)


def test_nothing_upstream_is_computed_where_no_gradient_of_the_input_is_kept():
    called = []
    first, weight = nn.Linear(4, 6), torch.randn(5, 6, requires_grad=True)
    hidden = first(torch.randn(3, 4))
    hidden.register_hook(called.append)
    y = ops.linear(hidden, weight, k=2, k_input=0)
    y.sum().backward()
    assert not called
    assert first.weight.grad is None
    assert weight.grad is not None


def test_where_nothing_is_kept_the_output_has_no_gradient_but_the_biass():
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((3, 4), (5, 4), (5,)))
    nothing = {"k": 1, "k_input": 0, "k_weight": 0}
    assert not ops.linear(x, w, **nothing).requires_grad
    assert not ops.linear(x, w, b, bias_grad="selected", **nothing).requires_grad
    ops.linear(x, w, b, **nothing).sum().backward()
    assert torch.equal(b.grad, torch.full((5,), 3.0))
    assert x.grad is None
    assert w.grad is None


def test_shares_that_are_none():
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    for wrong in (-1, 0.5, True, "half"):
        with pytest.raises(OpError, match=f"k_input={wrong!r}: expected an integer of at least 0"):
            ops.linear(x, w, k=2, k_input=wrong)
        with pytest.raises(OpError, match=f"k_weight={wrong!r}: expected an integer of at least 0"):
            ops.linear(x, w, k=2, k_weight=wrong)
    with pytest.raises(OpError, match="k=0: expected an integer of at least 1"):
        ops.linear(x, w, k=0, k_weight=0)


@every_operator
def test_compiled_code_has_the_same_gradients(operator):
    sample, dtype = operator.samples[0], operator.supports.compiled
    for shares, keywords in (((1, 3), {}), ((3, 0), {}), ((2, 2), {"score": "l2", "score_weight": True})):
        given = {
            "k": 3,
            "k_input": shares[0],
            "k_weight": shares[1],
            **operator.supports.defaults(**keywords),
        }
        leaves, others = sample.leaves(dtype), sample.leaves(dtype)
        output = operator.run(sample, leaves, **given)

        torch._dynamo.reset()

        @torch.compile(backend="aot_eager", fullgraph=True)
        def compiled(tensors, given=given):
            return operator.run(sample, tensors, **given)

        coefficients = sample.coefficients(output)
        found, wanted = (
            gradients(compiled(others), others, coefficients),
            gradients(output, leaves, coefficients),
        )
        assert_close(found, wanted, TOLERANCE[dtype])
