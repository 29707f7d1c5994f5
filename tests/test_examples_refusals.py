"""What part of a mini-batch cannot be taken for says so."""

import contextlib
from functools import partial

import pytest
import torch
from kept_nets import (
    Inherited,
    Joined,
    N,
    Net,
    Parts,
    inputs,
    make,
    make_sparse,
    output_gradient,
    whole_backward,
)
from kept_rows import assert_same, gradients
from torch.utils.flop_counter import FlopCounterMode

import fxprop
from fxprop.errors import ExamplesError, ModelError, PolicyError

pytestmark = pytest.mark.usefixtures("seeded")


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
