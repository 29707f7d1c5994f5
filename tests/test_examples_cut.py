"""Where the cut of a backward lies, and what is refused, with the user's line."""

import copy
import dataclasses
import linecache
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from kept_rows import assert_same, choice_of, differ, masked, recorded
from torch import nn
from torch.utils import _pytree

import fxprop
from fxprop.report.wording import notes

N, T = 6, 4
Pair = namedtuple("Pair", ["logits", "hidden"])


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


_pytree.register_dataclass(Output)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    """`rest(net, hidden)` is the end of the forward; `at_cut` goes around what stands in front of it."""

    def __init__(self, rest):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.rest = rest
        self.cut = None

    def forward(self, x):
        return self.rest(self, self.a(x).tanh())

    def at_cut(self, tensor):
        """The same tensor; in the oracle its gradient is masked by hand."""
        if self.cut is not None and tensor.requires_grad:
            tensor = tensor * 1
            tensor.register_hook(lambda grad: masked(grad, *self.cut))
        return tensor


def labels_of(logits):
    return torch.arange(len(logits)) % 3


def loss_of(net, logits):
    return F.cross_entropy(net.at_cut(logits), labels_of(logits))


def two_heads(net, z):
    return loss_of(net, net.c(net.b(z))) + 0.3 * net.at_cut(net.b(z)).square().mean()


def loss_and_logits(net, z):
    logits = net.at_cut(net.c(net.b(z)))
    return F.cross_entropy(logits, labels_of(logits)), logits


def contrastive(net, z):
    one, other = net.at_cut(net.b(z)), net.at_cut(net.b(z).sin())
    return F.cross_entropy(one @ other.T, torch.arange(len(one)))


def with_regulariser(net, z):
    return net.at_cut(net.c(net.b(z))), net.b.weight.square().sum()


def flat_tokens(net, z):
    tokens = net.b(z).unsqueeze(1) * torch.linspace(1, 2, T, dtype=z.dtype)[:, None]
    return net.c(tokens.view(-1, 8)).view(-1, T, 3)


def tokens_first(net, z):
    tokens = torch.linspace(1, 2, T, dtype=z.dtype)[:, None, None] * net.b(z)
    return net.c(tokens.reshape(-1, 8)).view(T, -1, 3).transpose(0, 1)


CUTS = {
    "one output": lambda net, z: net.at_cut(net.c(net.b(z))),
    "a list in a dict": lambda net, z: {"a": net.at_cut(net.c(z)), "b": [net.at_cut(net.b(z))]},
    "dataclass": lambda net, z: Output(net.at_cut(net.c(z)), net.at_cut(net.b(z))),
    "named tuple": lambda net, z: Pair(net.at_cut(net.c(z)), net.at_cut(net.b(z))),
    "loss": lambda net, z: loss_of(net, net.c(net.b(z))),
    "loss with logits": loss_and_logits,
    "loss of two heads": two_heads,
    "contrastive loss": contrastive,
    "a regulariser beside": with_regulariser,
    "flat tokens": lambda net, z: net.at_cut(flat_tokens(net, z)),
    "tokens first": lambda net, z: net.at_cut(tokens_first(net, z)),
}


def backward(model, x):
    """Gradients by name, of the sum of all outputs, each times its own random numbers."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    outputs = _pytree.tree_leaves(model(x))
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator).double() for o in outputs])
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CUTS)
def test_gradients_are_those_of_kept_examples_behind_the_cut(name):
    model, x = Net(CUTS[name]).double(), torch.randn(N, 5).double()
    gm, report = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), (x,))
    assert not report.examples.off
    with recorded(choice_of(gm)) as taken:
        ours = backward(gm, x)
    assert len(taken) == 1
    _, model.cut = taken[0][0], taken[0][1:]
    assert_same(ours, backward(model, x), 1e-9)
    model.cut = None
    assert differ(ours, backward(model, x))


def test_norms_of_several_outputs_are_added():
    model, x = Net(CUTS["a list in a dict"]).double(), torch.randn(N, 5).double()
    gm, _ = fxprop.transform(model, fxprop.Policy(examples=0.5), (x,))
    outputs = _pytree.tree_leaves(gm(x))
    grads = [torch.randn_like(output) for output in outputs]
    with recorded(choice_of(gm)) as taken:
        torch.autograd.backward(outputs, grads)
    torch.testing.assert_close(taken[0][0], sum(grad.norm(dim=1) for grad in grads))


REFUSED = {
    "products of pairs": (lambda net, z: net.c(net.b(z) @ z.T @ z), "in 2 dimensions"),
    "differences of pairs": (lambda net, z: net.b((z[:, None] - z).square().sum(1)), "in 2 dimensions"),
    "mean": (lambda net, z: net.c(z - z.mean(0)), "gives a sum over the examples back"),
    "softmax": (lambda net, z: net.c(z.softmax(0)), "works along the examples"),
    "permutation": (lambda net, z: net.c(net.b(z)[torch.tensor([1, 0, 2, 3, 5, 4])]), "which end at"),
    "half": (lambda net, z: net.c(net.b(z[:3])), "which end at"),
    "flip": (lambda net, z: net.c(z.flip(0)), "works along the examples"),
    "roll": (lambda net, z: net.c(z.roll(1, 0)), "works along the examples"),
    "sort": (lambda net, z: net.c(z.sort(0).values), "works along the examples"),
    "cumsum": (lambda net, z: net.c(z.cumsum(0)), "works along the examples"),
    "routing": (lambda net, z: net.c(net.b(z)[z.norm(dim=1).topk(3).indices]), "which end at"),
    "their number": (lambda net, z: net.c(net.b(z)) / len(z), "computes with the number of examples"),
    "a number of its own": (lambda net, z: net.b(z.view(6, 8)), "fixes the number of examples at 6"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_joins_examples_is_refused_with_its_line(name):
    rest, reason = REFUSED[name]
    model, x = Net(rest).double(), torch.randn(N, 5).double()
    before = copy.deepcopy(model.state_dict())
    gm, report = fxprop.transform(model, fxprop.Policy(examples=0.5), (x,))
    assert reason in report.examples.off
    line = linecache.getline(__file__, rest.__code__.co_firstlineno).strip()
    assert ("view(6, 8)" if name == "a number of its own" else line) in report.examples.off
    assert f"examples=0.5 is off, and all examples enter the backward: {report.examples.off}" in " ".join(
        notes(report)
    )
    assert_same(backward(gm, x), backward(model, x), 1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_batch_norm_is_not_refused():
    gm, report = fxprop.transform(
        Net(lambda net, z: net.c(net.norm(net.b(z)))), fxprop.Policy(examples=0.5), (torch.randn(N, 5),)
    )
    assert not report.examples.off
    gm(torch.randn(N, 5)).sum().backward()
    assert fxprop.kept_examples(gm) == (3, 6)


@pytest.mark.parametrize(
    "rest",
    [
        lambda net, z: net.c(z) * (1.0 / len(z)),
        lambda net, z: net.c(z) * len(z) ** -0.5,
        lambda net, z: F.embedding(torch.arange(len(z)).flip(0), net.b(z)),
    ],
)
def test_numbers_and_tables_made_of_the_examples_are_refused(rest):
    _, report = fxprop.transform(Net(rest), fxprop.Policy(examples=0.5), (torch.randn(N, 5),))
    assert "number of examples" in report.examples.off or "its table differs" in report.examples.off
