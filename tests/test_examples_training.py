"""Training on part of the mini-batch: autograd's habits, copies, schedules, and what must not be silent."""

import contextlib
import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kept_rows import SELECTS, assert_same, choice_of, differ, gradients, masked, recorded
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fxprop
from fxprop import schedules
from fxprop.errors import ExamplesError, ModelError, PolicyError

N = 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """Dropout, and a part that may be recomputed in the backward."""

    def __init__(self, dropout=0.0, recomputed=None):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout))
        self.fc = nn.Linear(8, 3)
        self.recomputed = recomputed

    def forward(self, x):
        x = self.first(x)
        if self.recomputed is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.recomputed == "reentrant")
        return self.fc(x)


class Joined(Net):
    def forward(self, x):
        x = self.first(x)
        return self.fc(x - x.mean(0))


class Tied(Net):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.middle[0].weight

    def forward(self, x):
        return self.fc(self.tied(self.middle(self.first(x))))


class Inherited(Net):
    def forward(self, x):
        return super().forward(x)


class Parts(nn.Module):
    """All outputs are views of one tensor."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 6)

    def forward(self, x):
        x = self.fc(x)
        return x[:, :3], x[:, 3:]


def inputs(n=N):
    return torch.randn(n, 5, dtype=torch.float64)


def output_gradient(n=N):
    return torch.randn(n, 3, dtype=torch.float64)


def make(model=None, **settings):
    """(the model, ours, what chooses its examples)"""
    model = (model or Net()).double()
    policy = fxprop.Policy(**{"keep": 1.0, "examples": 0.5, **settings})
    gm, _ = fxprop.transform(copy.deepcopy(model), policy, (inputs(),))
    return model, gm, choice_of(gm)


def make_sparse(**settings):
    """The same with half of the channels, but of the last layer all."""
    return make(keep=0.5, when="always", rules=[fxprop.Rule(name="fc", keep=1.0)], **settings)


@pytest.fixture(scope="module")
def made():
    return make()


@pytest.fixture
def net(made):
    """(the model, ours, what chooses its examples): one of each for many tests, as if just made."""
    model, gm, choice = made
    model.zero_grad(), gm.zero_grad()
    choice.share, choice.last = 0.5, None
    return model, gm, choice


def grads(module):
    return {name: p.grad for name, p in module.named_parameters()}


def by_hand(model, x, grad, taken, seed=0):
    """Adds the gradients of a backward that takes these examples to the model's."""
    torch.manual_seed(seed)
    model(x).backward(masked(grad, *taken[1:]))


def check(model, gm, choice):
    """The gradients of one step are those of the dense backward by hand."""
    x, grad = inputs(), output_gradient()
    with recorded(choice) as taken:
        output, ours = gradients(gm, [x], grad, seed=3)
    ((_, *chosen),) = taken
    expected, theirs = gradients(model, [x], grad, 3, *chosen)
    assert torch.equal(output, expected)
    assert_same(ours, theirs, 1e-9)
    assert fxprop.kept_examples(gm) == (N // 2, N)
    return x, grad, chosen, ours


# autograd's habits


def test_accumulation_and_a_smaller_last_mini_batch(net):
    model, gm, choice = net
    with recorded(choice) as taken:
        for n, k in [(6, 3), (4, 2), (3, 2)]:
            x, grad = inputs(n), output_gradient(n)
            gm(x).backward(grad)
            by_hand(model, x, grad, taken[-1])
            assert fxprop.kept_examples(gm) == (k, n)
    assert_same(grads(gm), grads(model), 1e-9)
    by_hand(model, x, grad, taken[-1])
    assert differ(grads(gm), grads(model))  # it can fail


@pytest.mark.parametrize("sizes", [(1, 2, N), (N, 2, 1)])
def test_of_one_or_two_examples_all_are_kept(net, sizes):
    model, gm, _ = net
    for n in sizes:
        x, grad = inputs(n), output_gradient(n)
        ours, theirs = gradients(gm, [x], grad)[1], gradients(model, [x], grad)[1]
        assert differ(ours, theirs) == (n == N)


@pytest.mark.parametrize("n", [1, 2])
def test_of_one_or_two_examples_the_count_is_not_that_of_an_earlier_backward(net, n):
    _, gm, _ = net
    gm(inputs()).sum().backward()
    gm(inputs(n)).sum().backward()
    assert fxprop.kept_examples(gm) in (None, (n, n))


def test_no_examples_at_all(net):
    model, gm, _ = net
    gm(inputs()).sum().backward()
    assert_same(
        gradients(gm, [inputs(0)], output_gradient(0))[1],
        gradients(model, [inputs(0)], output_gradient(0))[1],
        1e-9,
    )


def test_retain_graph(net):
    model, gm, choice = net
    x, grad = inputs(), output_gradient()
    output = gm(x)
    with recorded(choice) as taken:
        output.backward(grad, retain_graph=True)
        output.backward(grad)
    for one in taken:
        by_hand(model, x, grad, one)
    assert_same(grads(gm), grads(model), 1e-9)


def test_several_forwards_in_front_of_their_backwards():
    model, gm, choice = make(Net(dropout=0.3))
    batches, grad = [inputs(), inputs()], output_gradient()
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


def test_a_share_set_between_forward_and_backward_is_that_of_the_backward(net):
    _, gm, _ = net
    output = gm(inputs())
    fxprop.set_keep(gm, examples=1 / 3)
    output.sum().backward()
    assert fxprop.kept_examples(gm) == (2, N)


@pytest.mark.parametrize("wanted", ["parameters", "some", "input"])
def test_gradients_by_autograd_grad(net, wanted):
    model, gm, choice = net
    x, grad = inputs().requires_grad_(), output_gradient()

    def of(module):
        parameters = dict(module.named_parameters())
        if wanted == "input":
            return {"x": x}
        return parameters if wanted == "parameters" else {"fc.bias": parameters["fc.bias"]}

    with recorded(choice) as taken:
        ours = torch.autograd.grad(gm(x), of(gm).values(), grad)
    theirs = torch.autograd.grad(model(x), of(model).values(), masked(grad, *taken[0][1:]))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert grads(gm).keys() == grads(model).keys()


def test_dropout_draws_what_the_model_draws():
    model, gm, choice = make(Net(dropout=0.4))
    x, grad, chosen, ours = check(model, gm, choice)
    assert differ(ours, gradients(model, [x], grad, 4, *chosen)[1])
    torch.manual_seed(3)
    one = gm(x)
    torch.manual_seed(3)
    assert torch.equal(one, gm(x))
    assert not torch.equal(one, gm(x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("recomputed", ["reentrant", "not reentrant"])
def test_checkpoints_inside_the_model(recomputed, dropout):
    check(*make(Net(dropout, recomputed)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_module(use_reentrant):
    model, gm, choice = make(Net(dropout=0.4))
    x, grad = inputs().requires_grad_(), output_gradient()
    torch.manual_seed(3)
    with recorded(choice) as taken:
        checkpoint(gm, x, use_reentrant=use_reentrant).backward(grad)
    by_hand(model, x, grad, taken[0], seed=3)
    assert_same(grads(gm), grads(model), 1e-9)


def test_saved_tensors_may_be_moved_meanwhile(net):
    model, gm, choice = net
    x, grad = inputs(), output_gradient()
    pack = torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy)
    with pack:
        output = gm(x)
    with recorded(choice) as taken:
        output.backward(grad)
    by_hand(model, x, grad, taken[0])
    assert_same(grads(gm), grads(model), 1e-9)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_captured(monkeypatch, off):
    model, gm, _ = make()
    monkeypatch.setattr("fxprop.compact.install.call_compiled", None)
    x = inputs()
    with off():
        assert torch.equal(gm(x), model(x))
    for module in (model, gm):
        module.requires_grad_(False)
    assert torch.equal(gm(x), model(x))
    with pytest.raises(TypeError, match="not callable"):
        gm(x.requires_grad_())  # it can fail


def test_with_all_examples_nothing_is_captured(net, monkeypatch):
    model, gm, _ = net
    monkeypatch.setattr("fxprop.compact.install.call_compiled", None)
    fxprop.set_keep(gm, examples=1.0)
    x, grad = inputs(), output_gradient()
    assert_same(gradients(gm, [x], grad)[1], gradients(model, [x], grad)[1], 1e-12)
    assert fxprop.kept_examples(gm) is None


def test_eval_mode_has_a_backward_too():
    model, gm, choice = make(Net(dropout=0.5))
    for mode in (False, True, False):
        model.train(mode), gm.train(mode)
        check(model, gm, choice)


def test_tied_weights():
    model, gm, choice = make(Tied())
    assert gm.tied.weight is gm.middle[0].weight
    check(model, gm, choice)


def test_frozen_layers_get_no_gradient_and_may_change():
    model, gm, choice = make()
    everything = {name for name, _ in model.named_parameters()}
    for frozen in (["first"], ["middle", "fc"], []):
        for module in (model, gm):
            module.requires_grad_(True)
            for name in frozen:
                module.get_submodule(name).requires_grad_(False)
        ours = check(model, gm, choice)[-1]
        got = {name for name, grad in ours.items() if grad is not None}
        assert got == {n for n in everything if n.split(".")[0] not in frozen} | {"input 0"}


def test_layers_that_are_made_anew_are_trained():
    model, gm, choice = make()
    check(model, gm, choice)
    for module in (model, gm):
        torch.manual_seed(1)
        module.fc = nn.Linear(8, 3).double()
    check(model, gm, choice)
    assert gm.fc.weight.grad is not None


def test_gradients_of_inputs_lie_where_their_examples_do(net):
    model, gm, choice = net
    x, _, (examples, _), ours = check(model, gm, choice)
    assert ours["input 0"].shape == x.shape
    assert ours["input 0"].abs().sum(1).nonzero().flatten().tolist() == examples.tolist()


def test_inputs_keep_their_attributes(net):
    _, gm, _ = net
    x = inputs()
    x.note = "mine"
    torch._dynamo.mark_static(x, 1)
    before = dict(vars(x))
    gm(x).sum().backward()
    torchs = inputs()  # AOTAutograd marks what has a symbol
    torch.compile(nn.Linear(5, 3).double(), dynamic=True, backend="aot_eager")(torchs).sum().backward()
    assert {key: value for key, value in vars(x).items() if key not in vars(torchs)} == before


@pytest.mark.parametrize("change", ["input", "output"])
def test_changes_in_place(change):
    class Changing(Net):
        def forward(self, x):
            return self.fc(self.first(x.mul_(2) if change == "input" else x))

    model, gm, choice = make(Changing())
    grad, ours = output_gradient(), inputs()
    theirs = ours.clone()
    output, expected = gm(ours), model(theirs)
    if change == "output":
        output.mul_(2), expected.mul_(2)
    with recorded(choice) as taken:
        output.backward(grad)
    expected.backward(masked(grad, *taken[0][1:]))
    assert torch.equal(ours, theirs)
    assert_same(grads(gm), grads(model), 1e-9)


def test_hooks():
    _, gm, _ = make()
    seen = []
    gm.fc.weight.register_hook(lambda g: seen.append(("weight", tuple(g.shape))))
    gm.fc.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("grad", tuple(p.grad.shape))))
    gm.register_full_backward_hook(lambda _, of_inputs, of_outputs: seen.append(("module", of_outputs[0])))
    x = inputs().requires_grad_()
    x.register_hook(lambda g: seen.append(("input", tuple(g.shape))))
    grad = output_gradient()
    gm(x).backward(grad)
    found = dict(seen)
    assert len(seen) == len(found) == 4
    assert (found["weight"], found["grad"], found["input"]) == ((3, 8), (3, 8), (N, 5))
    assert torch.equal(found["module"], grad)


# what is not possible says so


def test_the_backward_of_the_backward_is_refused(net):
    _, gm, _ = net
    x = inputs().requires_grad_()
    (grad,) = torch.autograd.grad(gm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("function", ["grad", "vmap"])
def test_function_transforms_are_refused(net, function):
    _, gm, _ = net
    x = inputs()
    calls = {
        "grad": lambda: torch.func.grad(lambda x: gm(x).sum())(x),
        "vmap": lambda: torch.vmap(gm)(x),
    }
    with pytest.raises(ExamplesError, match="cannot capture the model in one graph: .*functorch"):
        calls[function]()


def compiled_step(gm, **options):
    @partial(torch.compile, **options)
    def step(x):
        return gm(x).sum()

    return step


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("compile", [torch.compile, compiled_step])
def test_a_transformed_module_is_not_compiled_again(net, compile, fullgraph):
    torch._dynamo.reset()
    _, gm, _ = net
    compiled = compile(gm, backend="eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match="torch.compile of a module that fxprop.transform gave a share"):
        compiled(inputs())


def test_without_gradients_it_may_be_compiled(net):
    model, gm, _ = net
    x = inputs()
    with torch.no_grad():
        assert torch.equal(torch.compile(gm, backend="eager")(x), model(x))


def test_a_transformed_module_is_not_transformed_again(net):
    _, gm, _ = net
    with pytest.raises(ModelError, match="was already transformed by fxprop"):
        fxprop.transform(gm, 0.5, (inputs(),))


def test_a_dispatch_mode_does_not_make_it_dense():
    _, gm, _ = make()
    with contextlib.suppress(ExamplesError), FlopCounterMode(display=False):
        gm(inputs()).sum().backward()
    gm(inputs()).sum().backward()
    assert fxprop.kept_examples(gm) == (N // 2, N)


def test_more_kinds_of_calls_than_torch_compile_has_versions(net):
    _, gm, _ = net
    with torch._dynamo.config.patch(recompile_limit=2):
        for rank in range(4):
            gm(torch.randn(N, *[2] * rank, 5).double()).sum().backward()
            assert fxprop.kept_examples(gm) == (N // 2, N)


def whole_backward(cut, *_):
    """What runs the part behind the cut on all examples, as a backward would that fxprop never saw."""

    def run(args):
        fed = [args[given.index] for given in cut.inputs]
        args.clear()
        return cut.compact(*fed)

    run._boxed_call = True
    return run


@pytest.mark.parametrize("build", [Net, Parts])
def test_a_backward_that_runs_on_all_examples_is_an_error(monkeypatch, build):
    _, gm, _ = make(build())
    fine = gm(inputs())
    sum(part.sum() for part in fine).backward()
    monkeypatch.setattr("fxprop.compact.compile.CutBackward", whole_backward)
    _, gm, _ = make(build())
    output = sum(part.sum() for part in gm(inputs()))
    with pytest.raises(ExamplesError, match=r"examples=0\.5 was asked for, but the backward ran on all"):
        output.backward()


def test_a_share_that_cannot_be_taken():
    model, x, grad = Joined().double(), inputs(), output_gradient()
    gm, report = fxprop.transform(model, fxprop.Policy(keep=1.0, examples=0.5), (x,))
    assert "return self.fc(x - x.mean(0))" in report.examples.off
    assert_same(gradients(gm, [x], grad)[1], gradients(model, [x], grad)[1], 1e-12)
    assert fxprop.kept_examples(gm) is None
    with pytest.raises(ExamplesError, match=r"examples=0\.25 cannot be taken: .*x - x\.mean\(0\)"):
        fxprop.set_keep(gm, examples=0.25)
    assert fxprop.set_keep(gm, examples=1.0).examples is None


def test_a_share_that_cannot_be_taken_any_more():
    model = Joined()
    model.first.requires_grad_(False)
    model, gm, _ = make(model)
    gm(inputs()).sum().backward()
    assert fxprop.kept_examples(gm) == (N // 2, N)
    gm.first.requires_grad_(True)
    with pytest.raises(ExamplesError, match=r"x - x\.mean\(0\)"):
        gm(inputs())


@pytest.mark.parametrize("share", [0, 1.5, -0.5, True, "some", float("nan")])
def test_what_is_no_share(net, share):
    _, gm, choice = net
    for call in (
        partial(fxprop.Policy, examples=share),
        partial(fxprop.set_keep, gm, examples=share),
        partial(fxprop.KeepScheduler, gm, examples=lambda step: share),
    ):
        with pytest.raises(
            PolicyError, match="examples=.*: expected a number with 0 < examples <= 1, or 'auto'"
        ):
            call()
    assert choice.share == 0.5


@pytest.mark.filterwarnings("error:.*has changed since:UserWarning")
def test_a_model_that_calls_the_forward_of_its_base():
    _, gm, choice = make_sparse(model=Inherited())
    gm(inputs()).sum().backward()
    assert choice.last == (N // 2, N)


# copies


@pytest.mark.parametrize("again", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_copies_have_a_choice_of_their_own(again):
    model, gm, choice = make(Net(dropout=0.2), examples="auto")
    gm(inputs()).sum().backward()
    other = again(gm)
    theirs = choice_of(other)
    assert theirs is not choice
    assert theirs.spread == choice.spread is not None
    theirs.share = 0.5
    gm.zero_grad()
    check(model, other, theirs)
    assert gm.first.weight.grad is None
    assert choice.share == "auto"
    assert choice.last == (N, N)


def test_state_dict_is_that_of_the_model():
    model, gm, _ = make()
    gm(inputs()).sum().backward()
    buffer = io.BytesIO()
    torch.save(gm.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)
    x = inputs()
    assert torch.equal(model(x), gm(x))
    nn.init.zeros_(model.fc.weight)
    gm.load_state_dict(model.state_dict())
    assert torch.equal(model(x), gm(x))


def test_restore_gives_the_dense_model_back():
    model, gm, choice = make_sparse()
    dense = fxprop.restore(gm)
    x, grad = inputs(), output_gradient()
    assert_same(gradients(dense, [x], grad)[1], gradients(model, [x], grad)[1], 1e-12)
    assert fxprop.kept_examples(dense) is None
    assert dense.fc.weight is gm.fc.weight
    gm(x).backward(grad)
    assert choice.last == (N // 2, N)


# other shares


def captured(function):
    """How many graphs torch.compile captures while `function` runs."""
    torch._dynamo.utils.counters.clear()
    function()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_another_share_or_mini_batch_compiles_nothing():
    _, gm, choice = make()

    def step(n=8):
        gm(inputs(n)).sum().backward()

    assert captured(step) > 0  # it can fail
    for share, k in [(0.25, 2), (0.75, 6), (1.0, None), (0.5, 4)]:
        report = fxprop.set_keep(gm, examples=share)
        assert (report.examples and report.examples.share) == (None if k is None else share)
        assert captured(step) == 0
        assert fxprop.kept_examples(gm) == choice.last == (None if k is None else (k, 8))
    fxprop.set_keep(gm, examples="auto")
    assert captured(step) == 0
    assert captured(lambda: step(12)) == 0


def test_a_keep_ratio_seen_before_compiles_nothing():
    _, gm, _ = make_sparse()

    def step():
        gm(inputs()).sum().backward()

    for keep in (0.5, 0.25):
        fxprop.set_keep(gm, keep)
        step()
    for keep in (0.5, 0.25, 0.5):
        fxprop.set_keep(gm, keep)
        assert captured(step) == 0


def test_channels_and_examples_are_set_apart():
    _, gm, choice = make_sparse()
    report = fxprop.set_keep(gm, 0.25)
    assert report.examples.share == 0.5
    assert "first" in {layer.name for layer in report.layers if layer.status == "rewritten"}
    gm(inputs()).sum().backward()
    assert choice_of(gm) is choice
    assert choice.last == (N // 2, N)
    report = fxprop.set_keep(gm, 0.5, examples=1 / 3)
    assert report.examples.share == 1 / 3
    gm(inputs()).sum().backward()
    assert fxprop.kept_examples(gm) == (2, N)
    report = fxprop.set_keep(gm, fxprop.Policy(keep=0.5))
    assert report.examples is None
    gm(inputs()).sum().backward()
    assert fxprop.kept_examples(gm) is None
    with pytest.raises(PolicyError, match="set_keep: give keep, examples, or both"):
        fxprop.set_keep(gm)


def lone_gradient(n=8):
    """Of one example alone."""
    return torch.zeros(n, 3, dtype=torch.float64).index_fill(0, torch.tensor([2]), 1.0)


def test_auto_follows_the_gradients_one_step_late():
    _, gm, _ = make(examples="auto", examples_least=0.25)
    kept = []
    for _ in range(3):
        gm(inputs(8)).backward(lone_gradient())
        kept.append(fxprop.kept_examples(gm))
    assert kept == [(8, 8), (2, 8), (2, 8)]


def test_what_auto_has_learnt_stays_while_all_examples_are_taken():
    _, gm, choice = make_sparse(examples="auto")
    gm(inputs(8)).backward(lone_gradient())
    spread = choice.state_dict()["spread"]
    fxprop.set_keep(gm, examples=1.0)
    fxprop.set_keep(gm, 0.25)
    fxprop.set_keep(gm, examples="auto")
    assert choice_of(gm).spread == spread


SHARES = schedules.Linear(1.0, 0.5, steps=4)


def test_schedule_of_examples(net):
    _, gm, _ = net
    scheduler = fxprop.KeepScheduler(gm, examples=SHARES)
    seen = []
    for _ in range(5):
        gm(inputs(8)).sum().backward()
        seen.append((scheduler.get_last_examples(), fxprop.kept_examples(gm)))
        scheduler.step()
    assert seen == [(1.0, None), (0.875, (7, 8)), (0.75, (6, 8)), (0.625, (5, 8)), (0.5, (4, 8))]
    assert scheduler.get_last_keep() == []


def test_schedules_of_examples_and_channels_together():
    _, gm, _ = make_sparse()
    channels = schedules.Linear(1.0, 0.25, steps=4)
    scheduler = fxprop.KeepScheduler(gm, channels, examples=SHARES, levels=None)
    for step, kept in enumerate([None, (7, 8), (6, 8)]):
        gm(inputs(8)).sum().backward()
        assert fxprop.kept_examples(gm) == kept
        assert scheduler.get_last_keep() == [channels(step)]
        scheduler.step()


def test_state_of_a_schedule_of_examples():
    _, gm, _ = make()
    scheduler = fxprop.KeepScheduler(gm, examples=SHARES)
    scheduler.step(), scheduler.step()
    state = pickle.loads(pickle.dumps(scheduler.state_dict()))
    _, other, choice = make()
    again = fxprop.KeepScheduler(other, examples=SHARES)
    again.load_state_dict(state)
    assert (again.last_step, again.get_last_examples(), choice.share) == (2, 0.75, 0.75)
    again.step()
    assert choice.share == 0.625


def test_state_of_another_schedule_of_examples_is_refused(net):
    _, gm, _ = net
    state = fxprop.KeepScheduler(gm, examples=SHARES, last_step=2).state_dict()
    other = fxprop.KeepScheduler(gm, examples=schedules.Linear(1.0, 0.25, steps=4))
    with pytest.raises(PolicyError, match="checkpoint"):
        other.load_state_dict(state)


def test_state_of_auto_is_in_that_of_the_scheduler():
    _, gm, _ = make(examples="auto", examples_least=0.25)
    scheduler = fxprop.KeepScheduler(gm, schedules.Constant(1.0))
    gm(inputs(8)).backward(lone_gradient())
    state = scheduler.state_dict()
    assert state["examples"] == {"spread": pytest.approx(7)}
    _, other, _ = make(examples="auto", examples_least=0.25)
    fxprop.KeepScheduler(other, schedules.Constant(1.0)).load_state_dict(state)
    other(inputs(8)).backward(lone_gradient())
    assert fxprop.kept_examples(other) == (2, 8)


def test_what_is_no_schedule_of_examples(net):
    _, gm, _ = net
    with pytest.raises(PolicyError, match="schedule of 'examples' is 0.5: expected one of"):
        fxprop.KeepScheduler(gm, examples=0.5)
    with pytest.raises(PolicyError, match="no schedule given"):
        fxprop.KeepScheduler(gm)


# learning


def losses(module, optimizer, steps=60):
    """Of a task that is easy to learn."""
    x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = x[:, :3].argmax(1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("share", [0.5, "auto"])
def test_sgd_learns(share):
    _, gm, choice = make(examples=share)
    for choice.select in SELECTS:
        gm.load_state_dict(Net().double().state_dict())
        optimizer = torch.optim.SGD(gm.parameters(), 0.1, momentum=0.9)
        found = losses(gm, optimizer)
        assert found[-1] < 0.5 * found[0], choice.select
    k, n = fxprop.kept_examples(gm)
    assert n == 64
    assert k == 32 or share == "auto"


def test_adam_learns_and_shares_parameters_with_the_model():
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=1.0, examples=0.5), (inputs(),))
    found = losses(gm, optimizer)
    assert found[-1] < 0.5 * found[0]
    x = inputs()
    assert torch.equal(gm(x), model(x))
