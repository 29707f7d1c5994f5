"""Training on part of the mini-batch: autograd's habits."""

import pytest
import torch
from kept_nets import N, Net, Tied, by_hand, check, grads, inputs, make, output_gradient
from kept_rows import assert_same, differ, gradients, masked, recorded
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxprop

pytestmark = pytest.mark.usefixtures("seeded")


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


def test_auto_that_keeps_all_mostly_calls_the_model_as_it_is():
    model, gm, _ = make(Net(), examples="auto")
    # all of one size, so that all are kept
    x, grad = inputs(), torch.nn.functional.normalize(output_gradient())
    names = []
    for _ in range(17):
        output = gm(x)
        names.append("Compiled" in output.grad_fn.name())
        output.backward(grad)
    # the first, which teaches, and then every eighth
    assert [n for n, compiled in enumerate(names) if compiled] == [0, 8, 16]
    model(x).backward(grad)
    assert_same(grads(gm), {name: 17 * g for name, g in grads(model).items()}, 1e-9)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_repeats_what_auto_did(use_reentrant):
    model, gm, _ = make(Net(dropout=0.4), examples="auto")
    x, grad = inputs().requires_grad_(), torch.nn.functional.normalize(output_gradient())
    for step in range(5):
        outputs = []
        for seed in range(3):
            torch.manual_seed(3 * step + seed)
            outputs.append(checkpoint(gm, x, use_reentrant=use_reentrant))
        for output in outputs:
            output.backward(grad)
    for seed in range(15):
        torch.manual_seed(seed)
        model(x).backward(grad)
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
