"""The compiled loops over kept entries: what they keep, what they compute, and among whom they share it."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import check, combinations, widest
from operators import OPERATORS
from torch import nn

import fxprop
from fxprop import ops

pytest.importorskip(
    "numba", reason="numba is not installed, and the loops need it: pip install 'fxprop[sparse]'"
)

from fxprop.ops.entries import available, product_loops, products, select
from fxprop.ops.entries.operator import entry_gradients

with_loops = [operator for operator in OPERATORS if operator.name not in ("grouped_mm", "conv_batch_norm")]


@pytest.fixture(autouse=True)
def whatever_is_set(monkeypatch):
    """The tests here are of the loops, also where the suite is run without them."""
    monkeypatch.delenv("FXPROP_SPARSE", raising=False)


@pytest.fixture
def forced(monkeypatch):
    """Loops wherever they can run; the list has an item for each of their calls."""
    calls = []

    def counted(*args):
        calls.append(args)
        return gradients(*args)

    gradients = products.gradients
    monkeypatch.setenv("FXPROP_SPARSE", "always")
    monkeypatch.setattr(products, "gradients", counted)
    return calls


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
    add_products = product_loops.add_products

    def lazy(*args):
        return add_products(*args[:11], args[11] - 1, *args[12:])

    operator = next(operator for operator in with_loops if operator.name == "linear")
    keywords = {"select": "element", "score": "l1", "score_fraction": 1.0}
    check(operator, operator.samples[0], torch.float64, 3, **keywords)
    monkeypatch.setattr(product_loops, "add_products", lazy)
    with pytest.raises(AssertionError, match="not close"):
        check(operator, operator.samples[0], torch.float64, 3, **keywords)


def test_half_types_and_other_devices_keep_the_mask(forced):
    for dtype, device in ((torch.float16, "cpu"), (torch.float32, "meta")):
        x, w = (torch.ones(4, 8, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        ops.linear(x, w, k=1, select="element").sum().backward()
        assert w.grad.dtype == dtype
    assert not forced


def kept_by_topk(rows, k):
    """0/1 mask, by the operator that the mask uses."""
    k = min(k, rows.shape[1])
    return torch.zeros_like(rows).scatter_(1, rows.abs().topk(k, dim=1, sorted=False).indices, 1)


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


SHAPES = {
    "a linear layer": lambda: (F.linear, ops.linear, (300, 700), (500, 700), {}),
    "a convolution": lambda: (F.conv2d, ops.conv2d, (6, 40, 17, 15), (96, 40, 3, 3), {"padding": 1, "stride": 2}),
    "a wide one": lambda: (F.conv2d, ops.conv2d, (4, 300, 8, 8), (300, 300, 3, 3), {"padding": 1}),
    "one of 1x1": lambda: (F.conv2d, ops.conv2d, (5, 96, 20, 20), (200, 96, 1, 1), {}),
    "a transposed one": lambda: (
        F.conv_transpose2d, ops.conv_transpose2d, (4, 48, 9, 9), (48, 32, 3, 3), {"stride": 2, "padding": 1},
    ),
}  # fmt: skip


def of_shape(name, dtype, k, last=False):
    """The two gradients of sizes at which the work is divided, and those of the mask."""
    dense, sparse, x, w, constants = SHAPES[name]()
    torch.manual_seed(0)
    x, w = torch.randn(x, dtype=dtype), torch.randn(w, dtype=dtype)
    if last and x.dim() == 4:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    x, w = x.requires_grad_(), w.requires_grad_()
    y = dense(x, w, **constants)
    grad = torch.randn_like(y)
    rows = grad.reshape(-1, grad.shape[-1]) if dense is F.linear else grad.flatten(1)
    mask = kept_by_topk(rows, k).view(grad.shape)
    found = torch.autograd.grad(sparse(x, w, **constants, k=k, select="element"), (x, w), grad)
    return found, torch.autograd.grad(y, (x, w), grad * mask)


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


@pytest.mark.parametrize("name", SHAPES)
def test_any_number_of_threads_gives_the_same_bits(forced, name):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(of_shape(name, torch.float32, 40)[0])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_backwards_in_several_threads_at_once(forced):
    x, w = torch.randn(6, 40, 17, 15), torch.randn(96, 40, 3, 3, requires_grad=True)
    y, found = ops.conv2d(x, w, k=40, select="element"), []
    grads = [torch.randn_like(y) for _ in range(4)]

    def gradient(grad):
        return torch.autograd.grad(y, w, grad, retain_graph=True)[0]

    def work(grad):
        found.append([gradient(grad) for _ in range(5)])

    wanted = {float(gradient(grad).sum()): gradient(grad) for grad in grads}
    threads = [threading.Thread(target=work, args=(grad,)) for grad in grads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for of_thread in found:
        assert all(torch.equal(one, wanted[float(one.sum())]) for one in of_thread)


IN_A_PROCESS = """
import torch, torch.multiprocessing as mp
from fxprop import ops
from fxprop.ops.entries import threads
def backward():
    torch.manual_seed(0)
    x, w = torch.randn(400, 300, requires_grad=True), torch.randn(500, 300, requires_grad=True)
    ops.linear(x, w, k=5, select="element").square().sum().backward()
    return w.grad.sum().item()
def child(queue):
    done = []
    # torch's own threads do not survive a fork, fxprop's are started anew
    threads.run([lambda n=n: done.append(n) for n in range(20)])
    torch.set_num_threads(1)
    queue.put((sorted(done), backward()))
if __name__ == "__main__":
    torch.set_num_threads(2)
    here = backward()
    context = mp.get_context("METHOD")
    queue = context.SimpleQueue()
    other = context.Process(target=child, args=(queue,))
    other.start()
    done, there = queue.get()
    other.join()
    print(done == list(range(20)), abs(here - there) < 1e-3 * abs(here), other.exitcode)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_come_from_one_that_has_run_them(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(IN_A_PROCESS.replace("METHOD", method))
    environment = {**os.environ, "FXPROP_SPARSE": "always"}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.stdout.split() == ["True", "True", "0"], run.stderr


IN_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
import fxprop
def gradients(model, x):
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]
def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 64), nn.Linear(64, 4))
    policy = fxprop.Policy(keep=0.05, select="element", when="always")
    return fxprop.transform(model, policy, (torch.randn(4, 3, 8, 8),))[0]
def train(rank, file):
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
    torch.manual_seed(1)
    parts = torch.randn(2, 4, 3, 8, 8)
    ours = gradients(nn.parallel.DistributedDataParallel(made()), parts[rank])
    alone = [gradients(made(), part) for part in parts]
    for grad, first, second in zip(ours, *alone):
        torch.testing.assert_close(grad, (first + second) / 2)
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(train, (sys.argv[1],), nprocs=2)
    print("equal")
"""


def test_two_processes_that_average_their_gradients(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(IN_TWO_PROCESSES)
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "meeting")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "FXPROP_SPARSE": "always"},
    )
    assert run.stdout.split() == ["equal"], run.stderr


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.linear = nn.Linear(8, 32)

    def forward(self, x):
        return self.linear(self.up(self.conv(x).relu()).relu().mean((2, 3)))


def sparse_net():
    torch.manual_seed(0)
    policy = fxprop.Policy(
        keep=0.1, select="element", when="always", rules=[fxprop.Rule(name="linear", k=5)]
    )
    return fxprop.transform(Net(), policy, (torch.randn(2, 3, 8, 8),))[0]


def step(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_and_for_any_batch(forced, backend):
    torch._dynamo.reset()
    model = sparse_net()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch in (3, 5):
        x = torch.randn(batch, 3, 8, 8)
        for ours, theirs in zip(step(compiled, x), step(model, x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert forced


def test_exported_with_a_free_batch(forced):
    model = sparse_net()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), model(x))


CALLS = {
    "a convolution": ((4, 6, 5, 5), (4, 3, 5, 5), (6, 3, 3, 3), [1, 1]),
    "a linear layer": ((6, 8), (6, 5), (8, 5), []),
    "no example": ((0, 8), (0, 5), (8, 5), []),
    "no output feature": ((6, 0), (6, 5), (0, 5), []),
    "no input channel": ((4, 6, 5, 5), (4, 0, 5, 5), (6, 0, 3, 3), [1, 1]),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [0, 5])
def test_torch_accepts_the_operator(call, layout, k):
    *shapes, ones = CALLS[call]
    tensors = [LAYOUTS[layout](torch.randn(shape)) for shape in shapes]
    constants = (ones, ones, ones, False, 1, 1, [True, True, True])
    torch.library.opcheck(entry_gradients, (*tensors, None, k, *constants))


@pytest.mark.parametrize("padding", [0, 1])
def test_the_report_counts_what_the_loops_multiply(forced, monkeypatch, padding):
    counted, add_products = [], product_loops.add_products

    def counting(*args):
        lengths, first, last = args[8], args[10], args[11]
        counted.append(int(lengths.sum()) * int(last - first))
        return add_products(*args)

    monkeypatch.setattr(product_loops, "add_products", counting)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 96, 3, padding=padding),
        nn.Conv2d(96, 96, 3, padding=padding),
        nn.Flatten(),
        nn.LazyLinear(10),
    )
    x = torch.randn(8, 3, 28, 28)
    model(x)
    gm, report = fxprop.transform(model, fxprop.Policy(keep=0.05, select="element", when="always"), (x,))
    gm(x).square().sum().backward()
    executed = [layer.executed for layer in report.layers]
    assert [layer.status for layer in report.layers] == ["rewritten", "rewritten", "dense"]
    assert sum(counted) * 2 == sum(of.grad_input + of.grad_weight for of in executed[:2])
    assert "2 layers compute with the kept entries alone, by compiled loops" in str(report)


def test_without_numba_nothing_changes_but_the_kernels(monkeypatch):
    monkeypatch.setenv("FXPROP_SPARSE", "0")
    x = torch.randn(64, 512)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    gm, report = fxprop.transform(model, fxprop.Policy(keep=0.05, select="element"), (x,))
    assert report.layers[0].executed == report.layers[0].dense
    assert "no time is saved (FXPROP_SPARSE=0 is set)" in " ".join(str(report).split())
    grads = step(gm, x)
    monkeypatch.setenv("FXPROP_SPARSE", "always")
    for ours, theirs in zip(grads, step(gm, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has other threads, and fxprop its own")
def test_torchs_threads_are_found():
    """An interface of compilers, not of torch: if a torch comes without it, fxprop's own threads are slower."""
    from fxprop.ops.entries import threads

    assert "OpenMP" in torch.__config__.parallel_info()
    assert threads.openmp() is not None


def test_fxprops_own_threads_do_the_same(forced, monkeypatch):
    from fxprop.ops.entries import threads

    monkeypatch.setattr(threads, "openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        done = []
        threads.run([lambda n=n: done.append(n) for n in range(50)])
        assert sorted(done) == list(range(50))
        with pytest.raises(ValueError, match="one of them"):
            threads.run([lambda: done.append(0), lambda: int("one of them"), lambda: done.append(0)])
    finally:
        torch.set_num_threads(before)


def test_numba_starts_no_threads_of_its_own(forced):
    import numba

    of_shape("a linear layer", torch.float32, 20)
    assert forced
    with pytest.raises(ValueError, match="Threading layer is not initialized"):
        numba.threading_layer()


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


def test_a_policy_of_what_is_not_zero_needs_no_keep(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3)
    )
    x = torch.randn(4, 3, 20, 20)
    gm, report = fxprop.transform(model, fxprop.Policy(select="nonzero"), (x,))
    assert [layer.status for layer in report.layers] == ["rewritten", "rewritten", "dense"]
    assert "select='nonzero' at 2 layers: the gradients are the dense ones" in " ".join(str(report).split())
    for ours, theirs in zip(step(gm, x), step(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    monkeypatch.setenv("FXPROP_SPARSE", "0")
    report = fxprop.estimate(model, fxprop.Policy(select="nonzero"), (x,))
    assert {layer.reason for layer in report.layers} == {"FXPROP_SPARSE=0 is set"}


def test_explain_says_by_what_entries_are_computed(monkeypatch):
    model = nn.Sequential(nn.Linear(768, 1024), nn.Linear(1024, 64), nn.Linear(64, 4))
    shape = (torch.empty(1000, 768, device="meta"),)
    gm, _ = fxprop.transform(
        model.to("meta"),
        fxprop.Policy(select="element", keep=0.02, when="always", rules=[fxprop.Rule(name="1", keep=0.9)]),
        shape,
    )
    assert "kernels     compiled loops (numba) over the kept entries alone" in fxprop.explain(gm, "0")
    assert "kernels     the dense kernels, on the mask: expected to be faster" in fxprop.explain(gm, "1")
    monkeypatch.setenv("FXPROP_SPARSE", "0")
    assert "kernels     the dense kernels, on the mask: FXPROP_SPARSE=0 is set" in fxprop.explain(gm, "0")


def test_a_layer_that_would_lose_is_dense_or_masked_as_the_policy_says():
    model = nn.Sequential(nn.Conv2d(64, 256, 1), nn.Conv2d(256, 64, 1), nn.Conv2d(64, 4, 1))
    x = torch.empty(8, 64, 56, 56, device="meta")
    reports = [
        fxprop.estimate(model, fxprop.Policy(select="element", keep=0.05, when=when), (x,))
        for when in ("faster", "always")
    ]
    first = [report.layers[0] for report in reports]
    assert [layer.status for layer in first] == ["dense", "rewritten"]
    assert "entries are too many for what each saves: predicted 0." in first[0].reason
    # slower than dense kernels, but not than those with the selection in front
    assert first[1].executed == first[1].sparse


def test_under_autocast_the_report_counts_the_dense_kernels():
    model, x = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 10)), torch.randn(64, 512)
    with torch.autocast("cpu", torch.bfloat16):
        gm, report = fxprop.transform(
            model, fxprop.Policy(keep=0.02, select="element", when="always"), (x,)
        )
        nonzero = fxprop.estimate(model, fxprop.Policy(select="nonzero"), (x,))
    assert report.layers[0].executed == report.layers[0].dense
    assert f"on the mask: {available.UNKNOWN}" in fxprop.explain(gm, "0")
    assert nonzero.layers[0].reason == available.UNKNOWN


def test_a_helper_that_fails_is_waited_for_and_told_of():
    from fxprop.ops.entries import threads

    done = []

    def fails():
        raise ValueError("no")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="no"):
            threads.run([*(lambda n=n: done.append(n) for n in range(50)), fails])
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == list(range(50))


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
