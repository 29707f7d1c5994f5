"""The sparse operators against dense autograd with a hand-made mask."""

from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprop import ops
from fxprop.errors import OpError, PolicyError
from fxprop.ops.scores import get_score

DENSE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SPARSE = {1: ops.conv1d, 2: ops.conv2d, 3: ops.conv3d}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}


def check_against_masked_dense(case, results, sparse, dense, masked):
    """The output is the dense operator's to the bit; every gradient is the masked one's."""
    arguments = {key: case[key] for key in ("k", "select", "score", "bias_grad")}
    keep = oracle.Keep(k=case["k"], select=case["select"], score=case["score"], bias=case["bias_grad"])
    y, grads = results(case, partial(sparse, **arguments))
    assert torch.equal(y, results(case, dense)[0])
    tolerance = TOLERANCE[case["dtype"]]
    for grad, want in zip(grads, results(case, masked(keep))[1], strict=True):
        assert (grad is None) == (want is None)
        if grad is not None:
            torch.testing.assert_close(grad, want, atol=tolerance, rtol=tolerance)


COMMON = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([torch.float64, torch.float32]),
        "select": st.sampled_from(["channel", "element"]),
        "score": st.sampled_from(["l1", "l2"]),
        "bias_grad": st.sampled_from(["full", "selected"]),
        "needs": st.tuples(st.booleans(), st.booleans(), st.booleans()),
    }
)


@st.composite
def conv_cases(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 4))
    per_group_in, per_group_out = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dims))
    dilation = draw(st.one_of(st.integers(1, 2), st.tuples(*[st.integers(1, 2)] * dims)))
    stride = draw(st.one_of(st.integers(1, 2), st.tuples(*[st.integers(1, 3)] * dims)))
    padding = draw(
        st.one_of(
            st.integers(0, 2), st.tuples(*[st.integers(0, 2)] * dims), st.sampled_from(["same", "valid"])
        )
    )
    if padding == "same":
        stride = 1
    batch = draw(st.sampled_from([None, 0, 1, 2, 3]))
    spatial = draw(st.tuples(*[st.integers(5, 7)] * dims))
    return {
        "dims": dims,
        "x": (*(() if batch is None else (batch,)), groups * per_group_in, *spatial),
        "weight": (groups * per_group_out, per_group_in, *kernel),
        "bias": draw(st.booleans()),
        "geometry": {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        "channels_last": dims > 1 and batch is not None and draw(st.booleans()),
        "k": draw(st.integers(1, 6)),
        **draw(COMMON),
    }


def conv_results(case, conv):
    """Output and gradients of `conv` on a case's tensors, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=case["dtype"])

    x, weight = randn(*case["x"]), randn(*case["weight"])
    bias = randn(case["weight"][0]) if case["bias"] else None
    if case["channels_last"]:
        memory_format = torch.channels_last if case["dims"] == 2 else torch.channels_last_3d
        x, weight = x.to(memory_format=memory_format), weight.to(memory_format=memory_format)
    tensors = [t for t in (x, weight, bias) if t is not None]
    for tensor, needs in zip(tensors, case["needs"], strict=False):
        tensor.requires_grad_(needs)
    y = conv(x, weight, bias, **case["geometry"])
    if y.requires_grad:
        y.backward(randn(*y.shape))
    return y, [t.grad for t in tensors]


@settings(max_examples=150, deadline=None)
@given(conv_cases())
def test_conv_equals_masked_dense(case):
    dims = case["dims"]
    check_against_masked_dense(
        case, conv_results, SPARSE[dims], DENSE[dims], partial(oracle.masked_conv, dims)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
def test_one_by_one_convolutions(stride, channels_last):
    case = {
        "dims": 2, "x": (3, 6, 7, 8), "weight": (10, 6, 1, 1), "bias": True, "channels_last": channels_last,
        "geometry": {"stride": stride, "padding": 0, "dilation": 1, "groups": 1},
        "dtype": torch.float64, "needs": (True, True, True),
    }  # fmt: skip
    grads = conv_results(case, lambda *a, **kw: ops.conv2d(*a, **kw, k=3))[1]
    expected = conv_results(case, oracle.masked_conv(2, oracle.Keep(k=3)))[1]
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-12, rtol=1e-12)
    assert grads[0].is_contiguous(memory_format=torch.channels_last) or not channels_last


@st.composite
def linear_cases(draw):
    return {
        "x": (*draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.integers(1, 6))),
        "out": draw(st.integers(1, 7)),
        "bias": draw(st.booleans()),
        "transposed": draw(st.booleans()),
        "k": draw(st.integers(1, 8)),
        **draw(COMMON),
    }


def linear_results(case, linear):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=case["dtype"])

    leaf = randn(*case["x"])
    weight = randn(case["out"], case["x"][-1])
    bias = randn(case["out"]) if case["bias"] else None
    tensors = [t for t in (leaf, weight, bias) if t is not None]
    for tensor, needs in zip(tensors, case["needs"], strict=False):
        tensor.requires_grad_(needs)
    x = leaf
    if case["transposed"] and leaf.dim() > 2:
        x = leaf.transpose(0, 1)  # not contiguous: dense matmul folds it by a path of its own
    y = linear(x, weight, bias)
    if y.requires_grad:
        y.backward(randn(*y.shape))
    return y, [t.grad for t in tensors]


@settings(max_examples=150, deadline=None)
@given(linear_cases())
def test_linear_equals_masked_dense(case):
    check_against_masked_dense(case, linear_results, ops.linear, F.linear, oracle.masked_linear)


def test_the_oracle_can_fail():
    """Another k, another score or the other bias rule does not pass as equal."""
    case = {
        "dims": 2, "x": (2, 4, 6, 6), "weight": (8, 4, 3, 3), "bias": True, "channels_last": False,
        "geometry": {"stride": 1, "padding": 1, "dilation": 1, "groups": 1},
        "dtype": torch.float64, "needs": (True, True, True),
    }  # fmt: skip
    _, grads = conv_results(case, lambda *a, **kw: ops.conv2d(*a, **kw, k=3))
    wrong = [oracle.Keep(k=4), oracle.Keep(k=3, select="element"), oracle.Keep(k=3, bias="selected")]
    for keep in wrong:
        _, expected = conv_results(case, oracle.masked_conv(2, keep))
        assert not all(torch.allclose(g, e) for g, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_half_types_score_in_float32(op, dtype):
    """In 16 bits the sums of these channels are equal, or overflow; in float32 the last ones win."""
    n, rows, k = 8, 4096, 2
    grad = torch.full((rows, n), 40.0)
    grad[0, -k:] += 8.0
    grad = grad.to(dtype)
    weight = torch.ones(n, 3, dtype=dtype, requires_grad=True)
    x = torch.ones(rows, 3, dtype=dtype)
    if op == "linear":
        ops.linear(x, weight, k=k).backward(grad)
        kept = weight.grad.abs().sum(1).nonzero().flatten()
    else:
        weight4 = weight.detach().view(n, 3, 1, 1).requires_grad_()
        ops.conv2d(x[..., None, None], weight4, k=k).backward(grad[..., None, None])
        kept = weight4.grad.flatten(1).abs().sum(1).nonzero().flatten()
        assert weight4.grad.dtype == dtype
    assert kept.tolist() == [n - 2, n - 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3000, 200), (5, 70, 60, 50), (1, 4, 300, 300), (0, 6, 2, 2)])
def test_scores_of_gradients_larger_than_the_cache(shape, dtype):
    grad = torch.randn(shape).to(dtype)
    dims = tuple(dim for dim in range(len(shape)) if dim != 1)
    for name, order in (("l1", 1), ("l2", 2)):
        expected = torch.linalg.vector_norm(grad.double(), order, dims)
        scores = get_score(name)(grad, dims)
        assert scores.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=0)


def test_ties_are_broken_as_topk_breaks_them():
    grad = torch.ones(4, 9)
    weight = torch.ones(9, 3, requires_grad=True)
    ops.linear(torch.ones(4, 3), weight, k=4).backward(grad)
    kept = weight.grad.sum(1).nonzero().flatten().tolist()
    assert kept == sorted(grad.abs().sum(0).topk(4).indices.tolist())


@pytest.mark.parametrize("select", ["channel", "element"])
def test_random_follows_torchs_generator(select):
    def kept(seed):
        weight = torch.ones(50, 3, requires_grad=True)
        y = ops.linear(torch.ones(1, 3), weight, k=5, select=select, score="random")
        torch.manual_seed(seed)
        y.sum().backward()
        return weight.grad.sum(1).nonzero().flatten().tolist()

    torch.manual_seed(3)
    expected = sorted(torch.rand(50).topk(5).indices.tolist())
    assert kept(3) == kept(3) == expected
    assert kept(3) != kept(4)


def test_registered_score_is_used_and_names_are_unique():
    name = "smallest_for_test"
    ops.register_score(name, lambda grad, dims: -torch.linalg.vector_norm(grad, 1, dims))
    weight = torch.ones(4, 3, requires_grad=True)
    grad = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    ops.linear(torch.ones(1, 3), weight, k=2, score=name).backward(grad)
    assert weight.grad.sum(1).nonzero().flatten().tolist() == [1, 3]
    with pytest.raises(PolicyError, match="already registered"):
        ops.register_score(name, lambda grad, dims: grad)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_in_place_activations_may_follow(shape, bias, transposed):
    x = torch.randn(shape, dtype=torch.double)
    x = x.transpose(0, -2).contiguous().transpose(0, -2) if transposed and len(shape) > 2 else x
    weight = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    offset = torch.randn(6, dtype=torch.double) if bias else None
    y = ops.linear(x, weight, offset, k=2)
    expected = F.linear(x, weight, offset)
    assert torch.equal(y, expected)
    y.relu_().sum().backward()
    assert weight.grad.any(1).sum() <= 2
    image, kernel = torch.randn(3, 5, 5), torch.randn(4, 3, 1, 1, requires_grad=True)
    for unbatched in (image, image[None]):
        ops.conv2d(unbatched, kernel, k=2).relu_().sum().backward()


def test_nan_and_inf_survive_selection():
    for bad in (float("nan"), float("inf")):
        for select in ("channel", "element"):
            x = torch.ones(2, 3, requires_grad=True)
            weight = torch.ones(20, 3, requires_grad=True)
            grad = torch.ones(2, 20)
            grad[1, 7] = bad
            ops.linear(x, weight, k=1, select=select).backward(grad)
            assert not x.grad.isfinite().all()
            assert not weight.grad.isfinite().all()


def test_autocast_gives_dense_dtypes():
    x = torch.randn(2, 3, 8, 8)
    weight = torch.randn(6, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dense = ops.conv2d(x, weight, k=2), F.conv2d(x, weight)
        z = ops.linear(x, torch.randn(5, 8, requires_grad=True), k=2)
    assert torch.equal(y, dense)
    assert y.dtype == z.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_double_backward_is_refused():
    x = torch.randn(2, 3, requires_grad=True)
    weight = torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.linear(x, weight, k=2).sum(), x, create_graph=True)
    with pytest.raises(OpError, match="double backward.*restore"):
        grad.sum().backward()


def test_nothing_is_recorded_without_grad():
    x, weight = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        assert not ops.linear(x, weight, k=2).requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.linear(x, weight, k=2), F.linear(x, weight))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"k": 0}, OpError, "k=0: expected an integer of at least 1"),
        ({"k": 1.5}, OpError, "k=1.5"),
        ({"k": True}, OpError, "k=True"),
        ({"k": 1, "select": "rows"}, OpError, "select='rows': expected one of channel, element"),
        ({"k": 1, "bias_grad": "no"}, OpError, "bias_grad='no'"),
        ({"k": 1, "score": "l3"}, OpError, "unknown score 'l3'.*l1, l2, random"),
    ],
)
@pytest.mark.parametrize("op", [ops.linear, ops.conv1d])
def test_bad_arguments(op, arguments, error, match):
    weight = torch.ones(3, 2) if op is ops.linear else torch.ones(3, 2, 1)
    with pytest.raises(error, match=match):
        op(torch.ones(2, 2), weight, **arguments)


def test_complex_is_refused():
    weight = torch.ones(3, 2, dtype=torch.complex64)
    with pytest.raises(OpError, match="complex tensors have no sparse backward"):
        ops.linear(torch.ones(2, 2, dtype=torch.complex64), weight, k=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_half_types_equal_the_oracle(dtype, select, groups):
    """Magnitudes far enough apart that rounding cannot change what is kept."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4).to(dtype).requires_grad_()
    weight = torch.randn(8, 8 // groups, 3, 3).to(dtype).requires_grad_()
    grad = torch.randn(2, 8, 2, 2).sign() * torch.logspace(0, 1, 64).view(2, 8, 2, 2)[:, torch.randperm(8)]
    ops.conv2d(x, weight, groups=groups, k=3, select=select).backward(grad.to(dtype))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    keep = oracle.Keep(k=3, select=select)
    oracle.masked_conv(2, keep)(*exact, groups=groups).backward(grad.to(dtype).double())
    for ours, theirs in zip((x, weight), exact, strict=True):
        assert ours.grad.dtype == dtype
        scale = theirs.grad.abs().max()
        assert (ours.grad.double() - theirs.grad).abs().max() < 2e-2 * scale
