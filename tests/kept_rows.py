"""The oracle of `examples`: a dense backward whose output gradients are masked and weighted by hand."""

import contextlib

import torch

from fxprop.compact.install import installed

SELECTS = ("importance", "top", "random")
# relative, of the dtype
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@contextlib.contextmanager
def recorded(choice):
    """What `choice` takes meanwhile: a list of (norms, examples, weights or None), one for each backward."""
    taken, own = [], choice.choose

    def choose(norms, k):
        chosen = own(norms, k)
        taken.append((norms, *chosen))
        return chosen

    choice.choose = choose
    try:
        yield taken
    finally:
        del choice.choose


def choice_of(gm):
    """What chooses for a transformed module."""
    forward = installed(gm)
    assert forward is not None, f"no examples are chosen: {gm._fxprop_recipe.examined.off}"
    return forward.choice


def masked(grad, examples, weights):
    """`grad` times its example's weight at these examples, 0 at all others."""
    factors = torch.zeros(len(grad), dtype=grad.dtype)
    for number, example in enumerate(examples.tolist()):
        factors[example] = 1.0 if weights is None else float(weights[number])
    return grad * factors.view(-1, *[1] * (grad.dim() - 1))


def leaves(inputs):
    """Copies that are asked for their gradients, where they can have some."""
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]


def gradients(model, inputs, grad, seed=0, examples=None, weights=None):
    """(output, gradients of parameters and inputs by name); with `examples`, `grad` is masked by hand."""
    inputs = leaves(inputs)
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(*inputs)
    output.backward(grad if examples is None else masked(grad, examples, weights))
    found = {name: p.grad for name, p in model.named_parameters()}
    return output.detach(), found | {f"input {i}": x.grad for i, x in enumerate(inputs)}


def differences(ours, theirs):
    """The relative difference of each gradient; infinity where one alone is None.

    Of one that is small beside the others, relative to them: a bias in front of a norm has only rounding.
    """
    assert ours.keys() == theirs.keys()
    least = 0.01 * max(float(other.norm()) for other in theirs.values() if other is not None) or 1.0
    found = {}
    for name, one in ours.items():
        other = theirs[name]
        if one is None or other is None:
            found[name] = 0.0 if one is other else float("inf")
        else:
            found[name] = float((one - other).norm()) / max(float(other.norm()), least)
    return found


def assert_same(ours, theirs, tolerance):
    """Gradients by name agree; relative to what a layer has at least."""
    worst = {name: d for name, d in differences(ours, theirs).items() if not d <= tolerance}
    assert not worst, worst


def differ(ours, theirs, tolerance=1e-3):
    """Whether a comparison would see a difference."""
    return any(d > tolerance for d in differences(ours, theirs).values())
