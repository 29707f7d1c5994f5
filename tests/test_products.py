"""The products' sparse backward against dense autograd with the output gradient masked by hand."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fxprop
from fxprop import ops
from fxprop.errors import OpError
from fxprop.ops.axes import Shapes
from fxprop.ops.catalogue import OPERATORS

DOUBLE = torch.double


def gradients(function, tensors, seed=0):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum().backward()
    return output, [t.grad for t in leaves]


def assert_same(sparse, masked, tensors):
    ours, theirs = gradients(sparse, tensors), gradients(masked, tensors)
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def masked(output, mask):
    output = output * 1
    output.register_hook(lambda grad: grad * mask(grad))
    return output


def features_mask(grad, dims, keep):
    """0/1 mask of the features in `dims` (last), the same for all rows."""
    flat = grad.flatten(-dims)
    return oracle.linear_mask(flat, keep).reshape(grad.shape)


SELECTS = st.sampled_from(["channel", "element"])
SCORES = st.sampled_from(["l1", "l2"])


@given(
    rows=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    n_in=st.integers(1, 6),
    n_out=st.integers(2, 7),
    k=st.integers(1, 7),
    select=SELECTS,
    score=SCORES,
)
def test_matmul_with_a_weight_on_the_right(rows, n_in, n_out, k, select, score):
    torch.manual_seed(0)
    x, w = torch.randn(*rows, n_in, dtype=DOUBLE), torch.randn(n_in, n_out, dtype=DOUBLE)
    keep = oracle.Keep(k=k, select=select, score=score)
    assert_same(
        lambda x, w: ops.matmul(x, w, k=k, select=select, score=score),
        lambda x, w: masked(x @ w, lambda g: oracle.linear_mask(g, keep)),
        (x, w),
    )


@given(batch=st.integers(1, 3), n_out=st.integers(2, 6), k=st.integers(1, 6), select=SELECTS)
def test_matmul_with_a_weight_on_the_left(batch, n_out, k, select):
    torch.manual_seed(0)
    x, w = torch.randn(batch, 4, 5, dtype=DOUBLE), torch.randn(n_out, 4, dtype=DOUBLE)
    keep = oracle.Keep(k=k, select=select)
    assert_same(
        lambda x, w: ops.matmul(w, x, weight="left", k=k, select=select),
        lambda x, w: masked(w @ x, lambda g: oracle.linear_mask(g.mT, keep).mT),
        (x, w),
    )


@given(batch=st.integers(1, 3), n_out=st.integers(2, 6), k=st.integers(1, 6), select=SELECTS)
def test_a_batch_of_weights_keeps_as_many_of_each(batch, n_out, k, select):
    torch.manual_seed(0)
    x, w = torch.randn(batch, 5, 3, dtype=DOUBLE), torch.randn(batch, 3, n_out, dtype=DOUBLE)
    keep = oracle.Keep(k=k, select=select)

    def mask(grad):
        return torch.stack([oracle.linear_mask(g, keep) for g in grad])

    assert_same(
        lambda x, w: ops.matmul(x, w, k=k, select=select),
        lambda x, w: masked(torch.bmm(x, w), mask),
        (x, w),
    )


@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("bias_grad", ["full", "selected"])
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 2.0)])
def test_addmm(select, bias_grad, beta, alpha):
    torch.manual_seed(0)
    bias, x, w = (torch.randn(s, dtype=DOUBLE) for s in ((5,), (7, 4), (4, 5)))
    keep = oracle.Keep(k=2, select=select)

    def expected(bias, x, w):
        if bias_grad == "selected":
            y = torch.addmm(bias, x, w, beta=beta, alpha=alpha)
            return masked(y, lambda g: oracle.linear_mask(g, keep))
        y = torch.addmm(bias.detach(), x, w, beta=beta, alpha=alpha)
        y = masked(y, lambda g: oracle.linear_mask(g, keep))
        return y + (beta * bias - beta * bias.detach())

    assert_same(
        lambda b, x, w: ops.addmm(b, x, w, beta=beta, alpha=alpha, k=2, select=select, bias_grad=bias_grad),
        expected,
        (bias, x, w),
    )


@pytest.mark.parametrize(
    ("equation", "shapes", "feature_dims"),
    [
        ("btd,df->btf", ((2, 3, 4), (4, 5)), 1),
        ("btd,dhk->bthk", ((2, 3, 4), (4, 2, 3)), 2),
        ("bthk,hkd->btd", ((2, 3, 2, 3), (2, 3, 5)), 1),
        ("nd,of->nof", ((2, 3), (4, 3)), None),
        ("bd, df", ((3, 4), (4, 5)), 1),
    ],
)
def test_einsum(equation, shapes, feature_dims):
    torch.manual_seed(0)
    x, w = (torch.randn(shape, dtype=DOUBLE) for shape in shapes)
    if feature_dims is None:
        with pytest.raises(OpError, match="an index is summed in one operand alone"):
            ops.einsum("nd,of->no", x, w, k=1)
        return
    keep = oracle.Keep(k=2)
    assert_same(
        lambda x, w: ops.einsum(equation, x, w, k=2),
        lambda x, w: masked(torch.einsum(equation, x, w), lambda g: features_mask(g, feature_dims, keep)),
        (x, w),
    )
    left, right = equation.partition("->")[0].split(",")
    swapped = f"{right},{left}" + "".join(equation.partition("->")[1:])
    if "->" in equation:
        y = ops.einsum(swapped, w, x, weight="left", k=2)
        assert torch.equal(y, torch.einsum(swapped, w, x))


@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    k=st.integers(1, 4),
    select=SELECTS,
    bias=st.sampled_from([None, "full", "selected"]),
)
def test_transposed_convolutions(dims, groups, per_group, stride, padding, k, select, bias):
    torch.manual_seed(0)
    name = f"conv_transpose{dims}d"
    sparse, dense = getattr(ops, name), getattr(F, name)
    x = torch.randn(2, 4, *[4] * dims, dtype=DOUBLE)
    w = torch.randn(4, per_group, *[3] * dims, dtype=DOUBLE)
    b = torch.randn(per_group * groups, dtype=DOUBLE)
    keep = oracle.Keep(k=k, select=select, bias=bias or "full")
    # the element mask caps k at C_out * spatial
    kwargs = {"stride": stride, "padding": padding, "output_padding": stride - 1, "groups": groups}

    def expected(x, w, b):
        y = dense(x, w, None, **kwargs)
        shape = (-1,) + (1,) * dims
        return oracle.masked(
            y, b if bias else None, shape, keep, lambda g: oracle.conv_mask(g, groups, keep)
        )

    def ours(x, w, b):
        return sparse(x, w, b if bias else None, **kwargs, k=k, select=select, bias_grad=bias or "full")

    tensors = (x, w, b)
    got, want = gradients(ours, tensors), gradients(expected, tensors)
    assert torch.equal(got[0], dense(x, w, b if bias else None, **kwargs))
    for one, other in zip(got[1], want[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("sizes", [(3, 4, 5), (0, 12, 0), (6, 0, 6)])
def test_grouped_mm_is_each_experts_linear(k, select, sizes):
    torch.manual_seed(0)
    x, w = torch.randn(12, 16), torch.randn(3, 16, 8)
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    keep = oracle.Keep(k=k, select=select)

    def expected(x, w):
        parts = torch.split(x, sizes)
        outputs = [
            masked(part @ w[e], lambda g: oracle.linear_mask(g, keep) if len(g) else g)
            for e, part in enumerate(parts)
        ]
        return torch.cat(outputs)

    ours = gradients(lambda x, w: ops.grouped_mm(x, w, offs=offs, k=k, select=select), (x, w))
    theirs = gradients(expected, (x, w))
    assert torch.equal(ours[0], F.grouped_mm(x, w, offs=offs))
    for one, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_wrong_mask_is_noticed():
    x, w = torch.randn(6, 4, dtype=DOUBLE), torch.randn(4, 5, dtype=DOUBLE)
    keep = oracle.Keep(k=3)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(
            lambda x, w: ops.matmul(x, w, k=2),
            lambda x, w: masked(x @ w, lambda g: oracle.linear_mask(g, keep)),
            (x, w),
        )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ops.matmul(torch.ones(3, 4), torch.ones(4), k=1), "the weight has no output features"),
        (
            lambda: ops.matmul(torch.ones(2, 3, 4), torch.ones(1, 4, 5), k=1),
            "sizes differ, and broadcasting",
        ),
        (lambda: ops.einsum("...i,io->...o", torch.ones(3, 4), torch.ones(4, 5), k=1), "every index named"),
        (
            lambda: ops.einsum("ii,io->io", torch.ones(4, 4), torch.ones(4, 5), k=1),
            "repeated in one operand",
        ),
        (
            lambda: ops.grouped_mm(torch.ones(2, 8, 8), torch.ones(2, 8, 8), offs=torch.ones(1), k=1),
            "expected .rows",
        ),
        (lambda: ops.matmul(torch.ones(3, 4), torch.ones(4, 5), k=0), "k=0: expected an integer"),
    ],
)
def test_what_a_product_cannot_take(call, match):
    with pytest.raises(OpError, match=match):
        call()


def loops(op, x, w, constants):
    """Multiply-adds counted one by one."""
    if op == "addmm":
        return sum(1 for _ in range(x[0]) for _ in range(w[0]) for _ in range(w[1]))
    if op == "conv_transpose1d":
        groups = constants["groups"]
        per_input = sum(1 for _ in range(w[1]) for _ in range(w[2]))
        assert w[0] % groups == 0
        return sum(per_input for _ in range(x[0]) for _ in range(x[1]) for _ in range(x[2]))
    raise AssertionError(op)


@pytest.mark.parametrize(
    ("op", "x", "w", "constants"),
    [("addmm", (3, 4), (4, 5), {}), ("conv_transpose1d", (2, 4, 6), (4, 3, 5), {"groups": 2})],
)
def test_multiply_adds_by_loops(op, x, w, constants):
    assert OPERATORS[op].axes(Shapes(x, w, None, constants)).multiply_adds == loops(op, x, w, constants)


def test_public_operators_are_documented():
    for name in ops.__all__:
        assert getattr(fxprop.ops, name).__doc__
