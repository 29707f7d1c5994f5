"""Every sparse operator of the table against dense autograd with the output gradient masked by hand."""

import itertools

import oracle
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from masked import (
    TOLERANCE,
    as_keep,
    assert_close,
    check,
    combinations,
    expected,
    features_kept,
    gradients,
    mask_of,
    widest,
)
from operators import LEAST, OPERATORS

from fxprop import ops
from fxprop.errors import OpError, PolicyError

HALF = (torch.bfloat16, torch.float16)

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)
every_sample = pytest.mark.parametrize(
    ("operator", "sample"),
    [
        pytest.param(operator, sample, id=f"{operator}-{number}")
        for operator in OPERATORS
        for number, sample in enumerate(operator.samples)
    ],
)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_combination_of_settings(operator, dtype):
    check_combinations(operator, dtype)


@every_operator
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_combination_of_settings_in_half_types(operator, dtype):
    check_combinations(operator, dtype)


def check_combinations(operator, dtype):
    sample = operator.samples[0]
    if dtype not in operator.supports.dtypes:
        with pytest.raises(RuntimeError, match="Expected mat_a to be Float32"):
            operator.run(sample, sample.leaves(dtype))
        return
    for keywords in combinations(operator):
        try:
            check(operator, sample, dtype, 3, **keywords)
        except AssertionError as error:
            error.add_note(str(keywords))
            raise
    if dtype in HALF:
        for other, select in itertools.product(operator.samples[1:], ("channel", "element")):
            check(operator, other, dtype, 2, **operator.supports.defaults(select=select))


@every_sample
@pytest.mark.parametrize("select", ["channel", "element"])
def test_one_some_and_all_in_every_shape_and_layout(operator, sample, select):
    for k in (1, 2, 10**6):
        check(operator, sample, widest(operator), k, select=select, score="l2", score_fraction=1.0)


@every_operator
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shapes_and_settings_that_are_drawn(operator, data):
    sample = data.draw(operator.drawn)
    keywords = data.draw(operator.supports.drawn())
    needs = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    if keywords.get("norm_grad") == "kept":
        needs = (needs[0], True, needs[2])  # with neither of the two the norm is called by itself
    k, dtype = data.draw(st.integers(1, 8)), data.draw(st.sampled_from(operator.supports.dtypes[:2]))
    try:
        check(operator, sample, dtype, k, needs, **keywords)
    except oracle.Tie:
        reject()


@every_sample
def test_as_many_as_there_are_is_the_dense_operator(operator, sample):
    dtype = widest(operator)
    leaves, others = sample.leaves(dtype), sample.leaves(dtype)
    output, dense = operator.run(sample, leaves, k=10**6), operator.run(sample, others)
    coefficients = sample.coefficients(output)
    ours, theirs = gradients(output, leaves, coefficients), gradients(dense, others, coefficients)
    assert all(torch.equal(grad, theirs[name]) for name, grad in ours.items() if grad is not None)


@every_operator
@pytest.mark.parametrize("select", ["channel", "element"])
def test_the_oracle_sees_one_position_more(operator, select):
    """Neither another k, nor one feature more in the mask, passes as equal."""
    sample, dtype = operator.samples[0], widest(operator)
    leaves = sample.leaves(dtype)
    output = operator.run(sample, leaves, k=2, select=select)
    coefficients = sample.coefficients(output)
    found = gradients(output, leaves, coefficients)
    keep = oracle.Keep(k=2, select=select)
    right = expected(operator, sample, leaves, coefficients, keep)
    assert_close(found, right, TOLERANCE[dtype])
    for other in (
        oracle.Keep(k=3, select=select),
        oracle.Keep(k=2, select="channel" if select == "element" else "element"),
    ):
        with pytest.raises(AssertionError, match="not close"):
            assert_close(found, expected(operator, sample, leaves, coefficients, other), TOLERANCE[dtype])
    mask = mask_of(operator, sample, coefficients, oracle.Keep(k=2, select=select, score=LEAST))
    with pytest.raises(AssertionError, match="not close"):
        assert_close(
            found, expected(operator, sample, leaves, coefficients, keep, mask=mask), TOLERANCE[dtype]
        )


@every_operator
def test_the_oracle_sees_every_setting(operator):
    """Each one, set otherwise, gives other gradients: none is ignored by both sides."""
    sample, dtype = operator.samples[0], widest(operator)
    coefficients = sample.coefficients(operator.run(sample, sample.leaves(dtype)))
    taken = operator.supports.settings()
    default = {name: values[0] for name, values in taken.items()}
    for name, values in taken.items():
        for value in values[1:]:
            if name in ("weight_grad", "score") and value in ("row_sparse", "l2"):
                continue  # another form of the same gradient; often the same choice
            differ = 0
            for k in range(1, 6):
                leaves = sample.leaves(dtype)
                output = operator.run(sample, leaves, k=k, **{**default, name: value})
                found = gradients(output, leaves, coefficients)
                wanted = expected(operator, sample, leaves, coefficients, as_keep(k, default))
                differ += any(not torch.allclose(found[key], wanted[key], 1e-4, 1e-4) for key in wanted)
            assert differ, f"{name}={value!r}"


@every_sample
def test_random_keeps_as_many_and_follows_torchs_generator(operator, sample):
    dtype = widest(operator)
    if 0 in sample.input:
        return  # nothing to choose from

    def step(seed):
        leaves = sample.leaves(dtype)
        output = operator.run(sample, leaves, k=2, score="random")
        torch.manual_seed(seed)
        coefficients = sample.coefficients(output)
        return leaves, coefficients, gradients(output, leaves, coefficients)

    leaves, coefficients, found = step(3)
    mask, counts = features_kept(operator, sample, leaves, found["weight"])
    assert 1 <= max(counts) <= 2  # fewer where a ReLU lets nothing through, or an expert has no rows
    keep = oracle.Keep(k=2, score="random")
    assert_close(found, expected(operator, sample, leaves, coefficients, keep, mask=mask), TOLERANCE[dtype])
    again = step(3)[2]["weight"]
    assert torch.equal(again, found["weight"])
    others = [step(seed)[2]["weight"] for seed in range(4, 10)]
    assert not all(torch.equal(other, again) for other in others)


def test_a_random_choice_of_elements_follows_torchs_generator():
    weight = torch.ones(50, 3, requires_grad=True)
    y = ops.linear(torch.ones(1, 3), weight, k=5, select="element", score="random")
    torch.manual_seed(3)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    torch.manual_seed(3)
    assert grad.sum(1).nonzero().flatten().tolist() == sorted(torch.rand(50).topk(5).indices.tolist())


@every_sample
def test_row_sparse_gradients_have_the_kept_rows_and_nothing_else(operator, sample):
    if not operator.supports.weight_grad:
        return
    dense, sparse = (sample.leaves(torch.float64) for _ in range(2))
    grads = []
    for leaves, weight_grad in ((dense, "dense"), (sparse, "row_sparse")):
        output = operator.run(sample, leaves, k=1, weight_grad=weight_grad)
        grads.append(gradients(output, leaves, sample.coefficients(output))["weight"])
    assert grads[1].is_sparse == (0 not in sample.input)
    assert torch.equal(grads[1].to_dense(), grads[0])
    if grads[1].is_sparse:
        assert grads[1].is_coalesced()
        assert grads[1].sparse_dim() == 1
        assert grads[1].indices().diff().gt(0).all()
        assert len(grads[1].values()) >= (grads[0].flatten(1) != 0).any(1).sum()


@every_operator
@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("score", ["l1", "l2", LEAST])  # "random" reads nothing
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_not_finite_survives_the_selection(operator, select, score, bad):
    for sample in operator.samples[:2]:
        leaves = sample.leaves(widest(operator))
        output = operator.run(sample, leaves, k=1, select=select, score=score)
        coefficients = sample.coefficients(output)
        # where a ReLU lets it through
        places = (output > 0).flatten().nonzero().flatten()
        coefficients.view(-1)[places[len(places) // 2]] = bad
        found = gradients(output, leaves, coefficients)
        assert not found["input"].isfinite().all()
        assert not found["weight"].to_dense().isfinite().all()


@every_operator
def test_nothing_is_recorded_where_no_gradient_is_wanted(operator):
    sample, dtype = operator.samples[0], widest(operator)
    leaves = sample.leaves(dtype)
    with torch.no_grad():
        output = operator.run(sample, leaves, k=2)
        assert not output.requires_grad
        assert torch.equal(output, operator.run(sample, sample.leaves(dtype)))
    with torch.inference_mode():
        assert torch.equal(operator.run(sample, leaves, k=2), operator.run(sample, leaves))
    frozen = sample.leaves(dtype, (False, False, False))
    if "norm" not in frozen:
        assert not operator.run(sample, frozen, k=2).requires_grad


@every_operator
def test_in_place_activations_may_follow(operator):
    for sample in operator.samples:
        if sample.constants.get("activation") == "relu":
            continue  # as behind torch's own, whose backward needs the output
        leaves = sample.leaves(widest(operator))
        output = operator.run(sample, leaves, k=2)
        before = output.detach().clone()
        assert torch.equal(output.relu_(), before.relu())
        output.sum().backward()
        assert leaves["weight"].grad is not None


@every_operator
def test_autocast_gives_the_types_of_the_dense_operator(operator):
    sample = operator.samples[0]
    ours, theirs = sample.leaves(torch.float32), sample.leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, dense = operator.run(sample, ours, k=2), operator.run(sample, theirs)
    assert torch.equal(output, dense)
    assert output.dtype == dense.dtype
    coefficients = sample.coefficients(output)
    found, wanted = gradients(output, ours, coefficients), gradients(dense, theirs, coefficients)
    types = [{name: grad.dtype for name, grad in g.items() if grad is not None} for g in (found, wanted)]
    assert types[0] == types[1]
    assert not torch.equal(found["weight"], wanted["weight"])
    if operator.supports.weight_grad:
        with torch.autocast("cpu", torch.bfloat16):
            output = operator.run(sample, ours, k=2, weight_grad="row_sparse")
        sparse = gradients(output, ours, coefficients)["weight"]
        assert sparse.is_sparse
        assert sparse.dtype == torch.float32
        assert torch.equal(sparse.to_dense(), found["weight"])


@every_operator
def test_compiled_code_gives_the_same_gradients(operator):
    sample, dtype = operator.samples[0], operator.supports.compiled
    ours, theirs = sample.leaves(dtype), sample.leaves(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(operator.run, fullgraph=True, backend="aot_eager")
    output, eager = compiled(sample, ours, k=2), operator.run(sample, theirs, k=2)
    torch.testing.assert_close(output, eager)
    coefficients = sample.coefficients(eager)
    assert_close(
        gradients(output, ours, coefficients), gradients(eager, theirs, coefficients), TOLERANCE[dtype]
    )


@every_operator
@pytest.mark.parametrize("weight_grad", ["dense", "row_sparse"])
def test_double_backward_is_refused(operator, weight_grad):
    sample = operator.samples[0]
    leaves = sample.leaves(widest(operator))
    form = {"weight_grad": weight_grad} if operator.supports.weight_grad else {}
    output = operator.run(sample, leaves, k=2, **form)
    (grad,) = torch.autograd.grad(output.square().sum(), leaves["weight"], create_graph=True)
    with pytest.raises(OpError, match="double backward.*restore"):
        grad.sum().backward()


@every_operator
def test_vmap_is_refused(operator):
    sample = operator.samples[0]
    leaves = sample.leaves(widest(operator))
    several = torch.stack([leaves["weight"].detach()] * 2).requires_grad_()

    def call(weight):
        return operator.run(sample, {**leaves, "weight": weight}, k=2).sum()

    with pytest.raises((OpError, RuntimeError), match="vmap over a sparse backward is not defined|vmap: "):
        torch.func.vmap(torch.func.grad(call))(several)


@every_operator
def test_keywords_that_an_operator_does_not_have(operator):
    sample = operator.samples[0]
    leaves = sample.leaves(widest(operator))
    for name, value in {**operator.supports.missing(), "keep": 0.5}.items():
        with pytest.raises(TypeError, match=rf"\(\) got an unexpected keyword argument '{name}'"):
            operator.run(sample, leaves, k=2, **{name: value})
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'k'"):
        operator.run(sample, leaves, select="channel")


@every_operator
@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"k": 0}, "k=0: expected an integer of at least 1"),
        ({"k": 1.5}, "k=1.5: expected an integer"),
        ({"k": True}, "k=True: expected an integer"),
        ({"select": "rows"}, "select='rows': expected one of channel, element"),
        ({"score": "l3"}, "unknown score 'l3'.*l1, l2, random"),
        ({"bias_grad": "no"}, "bias_grad='no': expected one of full, selected"),
        ({"weight_grad": "rows"}, "weight_grad='rows': expected one of dense, row_sparse"),
        ({"norm_grad": "some"}, "norm_grad='some': expected one of full, kept"),
    ],
    ids=str,
)
def test_values_that_a_keyword_cannot_have(operator, keywords, match):
    if set(keywords) & set(operator.supports.missing()):
        match = "got an unexpected keyword argument"
    sample = operator.samples[0]
    with pytest.raises((OpError, TypeError), match=match):
        operator.run(sample, sample.leaves(widest(operator)), **{"k": 1, **keywords})


@every_operator
def test_complex_tensors_are_refused(operator):
    sample = operator.samples[0]
    leaves = sample.leaves(torch.complex64) if sample.norm is None else sample.leaves(torch.float32)
    leaves["weight"] = leaves["weight"].to(torch.complex64)
    with pytest.raises(OpError, match="complex tensors have no sparse backward"):
        operator.run(sample, leaves, k=1)


def test_names_of_scores_are_taken_once():
    assert LEAST in ops.score_names()
    with pytest.raises(PolicyError, match=f"score '{LEAST}' is already registered"):
        ops.register_score(LEAST, lambda grad, dims: grad)


def test_every_public_operator_is_in_the_table():
    """Except the parts of attention, which have no sparse backward, and those with tests of their own."""
    without = {"Product", "attention", "check_same", "restore_layout", "sequence_first", "unpack"}
    without |= {"register_score", "score_names", "conv_group_norm"}
    named = {operator.name.split()[0] for operator in OPERATORS}
    assert named == set(ops.__all__) - without
