"""Training on part of the mini-batch: autograd's habits, copies, schedules, and what must not be silent."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from kept_rows import assert_same, choice_of, differ, gradients, masked, recorded
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxprop
from fxprop.errors import ExamplesError, PolicyError

N = 6


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    """Dropout, a buffer, and a part that may be recomputed in the backward."""

    def __init__(self, dropout=0.0, recomputes=False):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(dropout))
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 3)
        self.recomputes = recomputes

    def forward(self, x):
        x = self.first(x).relu()
        x = checkpoint(self.middle, x, use_reentrant=False) if self.recomputes else self.middle(x)
        return self.fc(self.norm(x))


def inputs(n=N):
    return torch.randn(n, 5, dtype=torch.float64)


def make(model=None, **settings):
    """(the model, ours, what chooses its examples)"""
    model = (model or Net()).double()
    policy = fxprop.Policy(**{"keep": 1.0, "examples": 0.5, **settings})
    gm, _ = fxprop.transform(copy.deepcopy(model), policy, (inputs(),))
    return model, gm, choice_of(gm)


def grads(module):
    return {name: p.grad for name, p in module.named_parameters()}


def by_hand(model, x, grad, taken, seed=0):
    """Adds the gradients of a backward that takes these examples to the model's."""
    torch.manual_seed(seed)
    model(x).backward(masked(grad, *taken[1:]))


def test_accumulation_and_a_smaller_last_mini_batch():
    model, gm, choice = make()
    with recorded(choice) as taken:
        for n in (6, 4, 3):
            x, grad = inputs(n), torch.randn(n, 3, dtype=torch.float64)
            gm(x).backward(grad)
            by_hand(model, x, grad, taken[-1])
            assert choice.last == (n // 2 + n % 2, n)
    assert_same(grads(gm), grads(model), 1e-9)


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_examples_are_all_kept(n):
    model, gm, _ = make()
    x, grad = inputs(n), torch.randn(n, 3, dtype=torch.float64)
    assert_same(gradients(gm, [x], grad)[1], gradients(model, [x], grad)[1], 1e-9)


def test_retain_graph():
    model, gm, choice = make()
    x, grad = inputs(), torch.randn(N, 3, dtype=torch.float64)
    output = gm(x)
    with recorded(choice) as taken:
        output.backward(grad, retain_graph=True)
        output.backward(grad)
    for one in taken:
        by_hand(model, x, grad, one)
    assert_same(grads(gm), grads(model), 1e-9)


def test_several_forwards_in_front_of_their_backwards():
    model, gm, choice = make(Net(dropout=0.3))
    batches, grad = [inputs(), inputs()], torch.randn(N, 3, dtype=torch.float64)
    outputs = []
    for seed, x in enumerate(batches):
        torch.manual_seed(seed)
        outputs.append(gm(x))
    with recorded(choice) as taken:
        for output in reversed(outputs):
            output.backward(grad)
    for seed, one in zip((1, 0), taken, strict=True):
        by_hand(model, batches[seed], grad, one, seed)
    assert_same(grads(gm), grads(model), 1e-9)


@pytest.mark.parametrize("recomputes", [False, True])
def test_dropout_draws_what_the_model_draws(recomputes):
    model, gm, choice = make(Net(0.4, recomputes))
    x, grad = inputs(), torch.randn(N, 3, dtype=torch.float64)
    with recorded(choice) as taken:
        output, ours = gradients(gm, [x], grad, seed=3)
    expected, theirs = gradients(model, [x], grad, 3, *taken[0][1:])
    assert torch.equal(output, expected)
    assert_same(ours, theirs, 1e-9)
    assert differ(ours, gradients(model, [x], grad, 4, *taken[0][1:])[1])


def test_without_gradients_nothing_is_captured(monkeypatch):
    model, gm, choice = make()
    monkeypatch.setattr("fxprop.compact.install.call_compiled", None)
    x = inputs()
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
    with torch.inference_mode():
        assert torch.equal(gm(x), model(x))
    fxprop.set_keep(gm, examples=1.0)
    gm(x).sum().backward()
    assert choice.last is None
    assert fxprop.kept_examples(gm) is None


def test_eval_mode_has_a_backward_too():
    model, gm, choice = make(Net(dropout=0.5))
    model.eval(), gm.eval()
    x, grad = inputs(), torch.randn(N, 3, dtype=torch.float64)
    with recorded(choice) as taken:
        _, ours = gradients(gm, [x], grad)
    assert_same(ours, gradients(model, [x], grad, 0, *taken[0][1:])[1], 1e-9)


def test_frozen_layers_and_tied_weights():
    model = Net()
    model.first.requires_grad_(False)
    model.middle[0].weight = nn.Parameter(model.middle[0].weight.detach())
    model.tied = nn.Linear(8, 8)
    model.tied.weight = model.middle[0].weight
    model.norm = nn.Sequential(model.tied, nn.LayerNorm(8))
    model, gm, choice = make(model)
    x, grad = inputs(), torch.randn(N, 3, dtype=torch.float64)
    with recorded(choice) as taken:
        gm(x).backward(grad)
    by_hand(model, x, grad, taken[0])
    assert gm.first.weight.grad is None
    assert_same(grads(gm), grads(model), 1e-9)
    # another layer is frozen, and the first one is not any more
    for module in (model, gm):
        module.zero_grad()
        module.first.requires_grad_(True)
        module.fc.requires_grad_(False)
    with recorded(choice) as taken:
        gm(x).backward(grad)
    by_hand(model, x, grad, taken[0])
    assert gm.fc.weight.grad is None
    assert_same(grads(gm), grads(model), 1e-9)


def test_gradients_of_inputs_lie_where_their_examples_do():
    _, gm, choice = make()
    x = inputs().requires_grad_()
    with recorded(choice) as taken:
        gm(x).sum().backward()
    rows = x.grad.abs().sum(1).nonzero().flatten()
    assert rows.tolist() == taken[0][1].tolist()


def test_inputs_keep_their_attributes():
    _, gm, _ = make()
    x = inputs()
    x.note = "mine"
    gm(x).sum().backward()
    assert vars(x) == {"note": "mine"}


def test_another_share_compiles_nothing():
    _, gm, choice = make()
    x = inputs(8)
    gm(x).sum().backward()
    torch._dynamo.utils.counters.clear()
    for share, k in [(0.25, 2), (0.75, 6), (0.5, 4)]:
        report = fxprop.set_keep(gm, examples=share)
        assert report.examples.share == share
        gm(x).sum().backward()
        assert fxprop.kept_examples(gm) == choice.last == (k, 8)
    assert not torch._dynamo.utils.counters["frames"]
    assert not torch._dynamo.utils.counters["stats"]


def test_channels_and_examples_are_set_apart():
    _, gm, choice = make(keep=0.5, when="always", rules=[fxprop.Rule(name="fc", keep=1.0)])
    report = fxprop.set_keep(gm, 0.25)
    assert report.examples.share == 0.5
    assert "first" in {layer.name for layer in report.layers if layer.status == "rewritten"}
    gm(inputs()).sum().backward()
    assert choice_of(gm) is choice
    assert choice.last == (3, 6)
    report = fxprop.set_keep(gm, fxprop.Policy(keep=0.5))
    assert report.examples is None
    gm(inputs()).sum().backward()
    assert fxprop.kept_examples(gm) is None


def test_copies_have_a_choice_of_their_own():
    model, gm, choice = make(examples="auto")
    gm(inputs()).sum().backward()
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert choice_of(other) is not choice
        assert choice_of(other).spread == choice.spread is not None
        x = inputs()
        assert torch.equal(other(x), model(x))
        choice_of(other).share = 0.5
        other.zero_grad()
        gm.zero_grad()
        other(x).sum().backward()
        assert choice_of(other).last == (3, 6)
        assert gm.first.weight.grad is None
    buffer = io.BytesIO()
    torch.save(gm.state_dict(), buffer)
    buffer.seek(0)
    assert list(torch.load(buffer)) == list(model.state_dict())


def test_restore_gives_the_dense_model_back():
    model, gm, _ = make()
    dense = fxprop.restore(gm)
    x, grad = inputs(), torch.randn(N, 3, dtype=torch.float64)
    assert_same(gradients(dense, [x], grad)[1], gradients(model, [x], grad)[1], 1e-12)
    gm(x).backward(grad)
    assert fxprop.kept_examples(gm) == (3, 6)


def test_schedule_of_examples():
    _, gm, choice = make()
    scheduler = fxprop.KeepScheduler(gm, examples=fxprop.schedules.Linear(1.0, 0.5, steps=4))
    shares = []
    for _ in range(5):
        gm(inputs(8)).sum().backward()
        shares.append((scheduler.get_last_examples(), fxprop.kept_examples(gm)))
        scheduler.step()
    assert shares[0] == (1.0, None)
    assert shares[2] == (0.75, (6, 8))
    assert shares[4] == (0.5, (4, 8))
    state = scheduler.state_dict()
    other = fxprop.KeepScheduler(gm, examples=fxprop.schedules.Linear(1.0, 0.5, steps=4))
    other.load_state_dict(state)
    assert other.get_last_examples() == 0.5
    with pytest.raises(PolicyError, match="schedule of 'examples' is 0.5: expected one of"):
        fxprop.KeepScheduler(gm, examples=0.5)


def test_auto_learns_and_its_state_is_the_schedulers():
    _, gm, choice = make(examples="auto", examples_least=0.25)
    scheduler = fxprop.KeepScheduler(gm, fxprop.schedules.Constant(1.0))
    kept = []
    grad = torch.zeros(8, 3, dtype=torch.float64).index_fill(0, torch.tensor([2]), 1.0)
    for _ in range(3):
        gm(inputs(8)).backward(grad)
        kept.append(fxprop.kept_examples(gm))
    assert kept == [(8, 8), (2, 8), (2, 8)]
    state = scheduler.state_dict()
    _, fresh, _ = make(examples="auto", examples_least=0.25)
    fxprop.KeepScheduler(fresh, fxprop.schedules.Constant(1.0)).load_state_dict(state)
    fresh(inputs(8)).backward(grad)
    assert fxprop.kept_examples(fresh) == (2, 8)


def test_hooks_on_parameters_and_an_optimizer_that_learns():
    torch.manual_seed(0)
    _, gm, choice = make()
    seen = []
    gm.fc.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    optimizer = torch.optim.Adam(gm.parameters(), 0.02)
    x = torch.randn(64, 5, dtype=torch.float64)
    labels = x.abs().argmax(1).clamp_max(2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(gm(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert len(seen) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert choice.last == (32, 64)


def test_a_backward_that_runs_on_all_examples_is_an_error(monkeypatch):
    # as one would that torch took from its cache, and fxprop never saw
    monkeypatch.setattr(
        "fxprop.compact.compile.CutBackward", lambda cut, choice, loss, compact: compact_whole(cut)
    )
    _, gm, _ = make()
    output = gm(inputs())
    with pytest.raises(ExamplesError, match=r"examples=0\.5 was asked for, but the backward ran on all"):
        output.sum().backward()


def compact_whole(cut):
    """The backward behind the cut, of all examples."""

    def run(args):
        fed = [args[given.index] for given in cut.inputs]
        args.clear()
        return cut.compact(*fed)

    return run


def test_a_transformed_module_is_not_compiled_again():
    _, gm, _ = make()
    with pytest.raises(Exception, match="torch.compile of a module that fxprop.transform gave a share"):
        torch.compile(gm)(inputs())


def test_the_backward_of_the_backward_is_refused():
    _, gm, _ = make()
    x = inputs().requires_grad_()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (grad,) = torch.autograd.grad(gm(x).square().sum(), x, create_graph=True)
        grad.sum().backward()


def test_a_share_that_cannot_be_taken():
    class Joined(Net):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    model = Joined().double()
    x = inputs().requires_grad_()
    gm, report = fxprop.transform(model, fxprop.Policy(examples=0.5), (x,))
    assert report.examples.off
    assert_same(
        gradients(gm, [x], torch.ones(N, 3).double())[1],
        gradients(model, [x], torch.ones(N, 3).double())[1],
        1e-12,
    )
    with pytest.raises(ExamplesError, match=r"examples=0\.25 cannot be taken: .*x - x\.mean\(0\)"):
        fxprop.set_keep(gm, examples=0.25)
