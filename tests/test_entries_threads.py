"""The compiled loops over kept entries: among which threads and in which processes they run."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from entries import SHAPES, of_shape

from fxprop import ops

pytest.importorskip(
    "numba", reason="numba is not installed, and the loops need it: pip install 'fxprop[sparse]'"
)

pytestmark = pytest.mark.usefixtures("whatever_is_set")


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
