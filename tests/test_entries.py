"""The compiled loops over kept entries: what they keep, and what they compute."""

import pytest
import torch
import torch.nn.functional as F
from entries import SHAPES, kept_by_topk, of_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import check, combinations, widest
from operators import OPERATORS

from fxprop import ops

pytest.importorskip(
    "numba", reason="numba is not installed, and the loops need it: pip install 'fxprop[sparse]'"
)

from fxprop.ops.entries import product_loops, products, select
from fxprop.ops.entries.rooms import Rooms

pytestmark = pytest.mark.usefixtures("whatever_is_set")

with_loops = [operator for operator in OPERATORS if operator.name not in ("grouped_mm", "conv_batch_norm")]


@pytest.mark.parametrize("operator", with_loops, ids=str)
@pytest.mark.parametrize(("dtype", "k"), [(torch.float64, 3), (torch.float32, 1)], ids=str)
def test_every_operator_and_setting_by_the_loops(forced, operator, dtype, k):
    for sample in operator.samples:
        for keywords in combinations(operator):
            if keywords["select"] != "element" or keywords["score_fraction"] != 1:
                continue
            check(operator, sample, dtype, k, **keywords)
    assert forced


@pytest.mark.parametrize("operator", with_loops, ids=str)
def test_shapes_that_are_drawn_by_the_loops(monkeypatch, operator):
    monkeypatch.setenv("FXPROP_SPARSE", "always")

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def run(data):
        sample, k = data.draw(operator.drawn), data.draw(st.integers(1, 12))
        needs = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
        keywords = {} if operator.supports.bias_grad is False else {"bias_grad": "selected"}
        check(operator, sample, widest(operator), k, needs, select="element", score="l1", score_fraction=1.0,
              **keywords)  # fmt: skip

    run()


def test_the_comparison_notices_a_loop_that_leaves_an_entry_out(forced, monkeypatch):
    add_to_rows = product_loops.add_to_rows

    def lazy(*args):
        starts = args[9].copy()
        starts[:, -1] -= 1
        return add_to_rows(*args[:9], starts, *args[10:])

    operator = next(operator for operator in with_loops if operator.name == "linear")
    keywords = {"select": "element", "score": "l1", "score_fraction": 1.0}
    check(operator, operator.samples[0], torch.float64, 3, **keywords)
    monkeypatch.setattr(product_loops, "add_to_rows", lazy)
    with pytest.raises(AssertionError, match="not close"):
        check(operator, operator.samples[0], torch.float64, 3, **keywords)


def test_half_types_and_other_devices_keep_the_mask(forced):
    for dtype, device in ((torch.float16, "cpu"), (torch.float32, "meta")):
        x, w = (torch.ones(4, 8, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        ops.linear(x, w, k=1, select="element").sum().backward()
        assert w.grad.dtype == dtype
    assert not forced


def kept_by_loops(rows, k):
    mask = torch.zeros_like(rows)
    kept = select.largest(rows, False, k)
    for n, count in enumerate(kept.counts):
        index = torch.from_numpy(kept.places[n, :count].astype("int64"))
        assert (index.diff() > 0).all()
        assert torch.equal(
            rows[n][index].nan_to_num(7.0), torch.from_numpy(kept.value[n, :count]).nan_to_num(7.0)
        )
        mask[n][index] = 1
    return mask


SPECIAL = {
    "any": lambda rows: rows,
    "rounded, with many that are equal": lambda rows: (2 * rows).round() / 2,
    "mostly zero": lambda rows: rows * (torch.rand_like(rows) < 0.03),
    "all zero": torch.zeros_like,
    "all equal": torch.ones_like,
    "equal but for the sign": torch.sign,
    "of one octave": lambda rows: 1 + rows.abs() / 1e4,
    "tiny": lambda rows: rows * torch.finfo(rows.dtype).tiny / 8,
    "one large": lambda rows: rows.index_fill(1, torch.tensor([0]), 1e6),
    "some NaN": lambda rows: torch.where(torch.rand_like(rows) < 0.01, float("nan"), rows),
    "some infinite": lambda rows: torch.where(torch.rand_like(rows) < 0.01, -float("inf"), rows),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 700, 5000])
def test_the_kept_entries_are_those_of_topk(dtype, kind, n):
    torch.manual_seed(n)
    rows = SPECIAL[kind](torch.randn(3, n, dtype=dtype))
    for k in sorted({1, max(1, n // 20), max(1, n // 2), n}):
        # an entry that is zero is as good as none
        wanted = kept_by_topk(rows, k) * (rows != 0)
        assert torch.equal(kept_by_loops(rows, k), wanted), k


def test_every_nan_ranks_alike():
    bits = torch.full((1, 5000), 0x7F800001, dtype=torch.int32)
    bits[0, ::7] = 0x7FC00000
    rows = bits.view(torch.float32)
    for k in (100, 715, 2000):
        assert torch.equal(kept_by_loops(rows, k), kept_by_topk(rows, k)), k


def test_the_selection_is_the_same_in_every_layout():
    grad = (2 * torch.randn(3, 8, 9, 9)).round()
    last = grad.to(memory_format=torch.channels_last)
    kept, others = select.largest(grad, False, 60), select.largest(last, True, 60)
    masks = select.masked(grad, False, kept), select.masked(last, True, others)
    assert torch.equal(*masks)
    assert masks[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("last", [False, True])
def test_sizes_at_which_work_is_divided(forced, name, dtype, last):
    found, wanted = of_shape(name, dtype, 40, last)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 if dtype == torch.float32 else 1e-9, rtol=1e-4)
        assert ours.stride() == theirs.stride()
    assert len(forced) == 1


@pytest.mark.parametrize("shape", [(400, 300), (30, 9000)])
def test_rows_without_an_entry_get_zeros(forced, shape):
    """Gradients of a linear layer are made of memory that is not cleared before."""
    rows, width = shape
    x, w = torch.randn(rows, width), torch.randn(200, width)
    leaves = [t.requires_grad_() for t in (x, w)]
    there = (torch.arange(rows) % 3 == 1)[:, None] & (torch.arange(200) % 7 == 2)
    for grad in (there * torch.randn(rows, 200), torch.zeros(rows, 200)):
        for kind in ("element", "nonzero"):
            found = torch.autograd.grad(ops.linear(x, w, k=150, select=kind), leaves, grad)
            for ours, theirs in zip(found, (grad @ w, grad.t() @ x), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
                assert (ours.any(1) == theirs.any(1)).all()
    assert len(forced) == 4


def sparse_behind(x, pooled):
    return F.max_pool2d(x.relu(), 2) if pooled else x.relu()


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_what_is_not_zero_gives_the_dense_gradients(forced, name, needs):
    shapes = {"linear": ((64, 80), (100, 80)), "conv2d": ((4, 16, 12, 12), (24, 16, 3, 3))}[name]
    dense, sparse = getattr(F, name), getattr(ops, name)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    leaves = [t.requires_grad_() for t, needed in zip(tensors, needs, strict=True) if needed]
    grads = []
    for y in (dense(*tensors), sparse(*tensors, k=1, select="nonzero")):
        grads.append(torch.autograd.grad(sparse_behind(y, name == "conv2d").square().sum(), leaves))
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert len(forced) == 1


def test_how_few_are_left_decides_at_each_backward(monkeypatch):
    calls, gradients = [], products.gradients
    monkeypatch.setattr(products, "gradients", lambda *args: calls.append(1) or gradients(*args))
    x, w = torch.randn(512, 1024), torch.randn(1024, 1024, requires_grad=True)
    y = ops.linear(x, w, k=1, select="nonzero")
    grad = torch.randn_like(y)
    for share, expected in ((1.0, 0), (0.5, 0), (0.02, 1), (0.0, 2)):
        left = grad * (torch.rand_like(grad) < share)
        (ours,) = torch.autograd.grad(y, w, left, retain_graph=True)
        torch.testing.assert_close(ours, left.t() @ x, atol=1e-3, rtol=1e-3)
        assert len(calls) == expected, share


def test_where_nothing_can_be_kept_on_disk_loops_are_compiled_all_the_same(monkeypatch):
    from fxprop.ops.entries import compiled

    njit = compiled.njit

    def without_folder(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(compiled, "njit", without_folder)
    assert compiled.compiled(lambda a, b: a + b)(2, 3) == 5


def test_the_first_call_is_told_of(caplog, forced, monkeypatch):
    from fxprop.ops.entries import operator

    monkeypatch.setattr(operator, "_called", set())
    with caplog.at_level("INFO", "fxprop"):
        for _ in range(2):
            of_shape("a linear layer", torch.float32, 20)
    assert [record.message for record in caplog.records] == [
        "fxprop: compiling the loops over kept entries for torch.float32, unless they are kept on disk"
    ]


def test_memory_is_used_again_by_later_calls_alone():
    with Rooms() as rooms:
        first, second = (rooms.take(size, torch.float32) for size in (100, 200))
        assert first.data_ptr() != second.data_ptr()
    with Rooms() as rooms:
        again = {rooms.take(50, torch.float64).data_ptr(), rooms.take(50, torch.float64).data_ptr()}
        assert again == {first.data_ptr(), second.data_ptr()}
        large = rooms.take(2**24, torch.float32)
    with Rooms() as rooms:
        # it would be held for good
        assert all(rooms.take(1, torch.float32).data_ptr() != large.data_ptr() for _ in range(9))
