"""Small networks whose backward takes part of the mini-batch, and comparisons with one by hand."""

import copy

import torch
from kept_rows import assert_same, choice_of, gradients, masked, recorded
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxprop

N = 6


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


def whole_backward(cut, *_):
    """What runs the part behind the cut on all examples, as a backward would that fxprop never saw."""

    def run(args):
        fed = [args[given.index] for given in cut.inputs]
        args.clear()
        return cut.compact(*fed)

    run._boxed_call = True
    return run
