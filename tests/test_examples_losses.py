"""Models that return their loss: the losses there are, and what stands beside them; refused or right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from kept_rows import assert_same, choice_of, differ, masked, recorded
from torch import nn
from torch.utils import _pytree

import fxprop

N = 6
LABELS = torch.arange(N) % 3
SOME = torch.tensor([0, -100, 2, 1, -100, 0])
WEIGHTS = torch.linspace(1, 2, 8).double()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    """`loss(net, hidden, cut)` is the end of the forward; `cut` goes around what enters the loss."""

    def __init__(self, loss):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.sigma = nn.Parameter(torch.tensor(0.3))
        self.loss, self.chosen = loss, None

    def forward(self, x):
        return self.loss(self, self.a(x).tanh(), self.at_cut)

    def at_cut(self, tensor):
        if self.chosen is not None and tensor.requires_grad:
            tensor = tensor * 1
            tensor.register_hook(lambda grad: masked(grad, *self.chosen))
        return tensor


def auxiliary(net, z, cut):
    hidden = net.b(z)
    return cut(net.c(hidden.relu())), cut(hidden).softmax(1).mean(0).square().sum()


def contrastive(net, z, cut):
    one, other = F.normalize(cut(net.b(z))), F.normalize(cut(net.c(z)))
    return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(z)))


def redundancy(net, z, cut):
    return (cut(net.b(z)).T @ cut(net.c(z)) / len(z) - torch.eye(8).double()).square().sum()


LOSSES = {
    "ignored labels": lambda net, z, cut: F.cross_entropy(cut(net.b(z)), SOME),
    "weights of classes": lambda net, z, cut: F.cross_entropy(cut(net.b(z)), LABELS, WEIGHTS, label_smoothing=0.1),
    "sum / number": lambda net, z, cut: F.cross_entropy(cut(net.b(z)), LABELS, reduction="sum") / len(z),
    "sum * (1 / number)": lambda net, z, cut: F.cross_entropy(cut(net.b(z)), LABELS, reduction="sum") * (1.0 / len(z)),
    "binary": lambda net, z, cut: F.binary_cross_entropy_with_logits(cut(net.b(z)), (z > 0).double()),
    "huber": lambda net, z, cut: F.huber_loss(cut(net.b(z)), z.detach(), reduction="sum"),
    "divergence": lambda net, z, cut: F.kl_div(cut(net.b(z)).log_softmax(1), cut(net.c(z)).softmax(1), reduction="batchmean"),
    "triplet": lambda net, z, cut: F.triplet_margin_loss(cut(net.b(z)), cut(net.c(z)), z.detach()),
    "contrastive": contrastive,
    "redundancy": redundancy,
    "variance": lambda net, z, cut: F.relu(1 - cut(net.b(z)).var(0).sqrt()).mean(),
    "batch norm inside": lambda net, z, cut: F.batch_norm(cut(net.b(z)), None, None, training=True).pow(3).mean(),
    "of a part": lambda net, z, cut: F.mse_loss(cut(net.b(z))[:5], z[:5].detach()),
    "penalty of weights": lambda net, z, cut: F.cross_entropy(cut(net.b(z)), LABELS) + net.b.weight.square().sum(),
    "penalty of activations": lambda net, z, cut: F.cross_entropy(cut(net.b(z)), LABELS) + cut(z).abs().mean(),
    "a temperature": lambda net, z, cut: F.cross_entropy(cut(net.b(z) * net.sigma.exp()), LABELS),
    "dictionary": lambda net, z, cut: {"loss": F.cross_entropy(cut(net.b(z)), LABELS), "logits": cut(net.c(z))},
    "two": lambda net, z, cut: (F.cross_entropy(cut(net.b(z)), LABELS), F.mse_loss(cut(net.c(z)), z.detach())),
    "a vector of two": lambda net, z, cut: torch.stack([F.cross_entropy(cut(net.b(z)), LABELS), F.mse_loss(cut(net.c(z)), z.detach())]),
    "auxiliary": auxiliary,
    "one of each": lambda net, z, cut: cut(F.cross_entropy(net.b(z), z.argmax(1), reduction="none")),
}  # fmt: skip
# parameters behind the sum over the examples, where the cut cannot be
REFUSED = {
    "learned weight": lambda net, z, cut: F.mse_loss(net.b(z), z.detach()) * net.sigma.exp() + net.sigma,
    "learned weight of one of two": lambda net, z, cut: F.cross_entropy(net.c(z), LABELS) + F.mse_loss(net.b(z), z.detach()) * net.sigma.exp(),
    "mean against a parameter": lambda net, z, cut: F.mse_loss(net.b(z).mean(0), net.c.bias),
    "temperature of pairs": lambda net, z, cut: F.cross_entropy(net.sigma.exp() * (net.b(z) @ z.T), torch.arange(len(z))),
}  # fmt: skip


def backward(model, x):
    """Gradients by name, of the sum of all outputs, each times its own random numbers."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    outputs = _pytree.tree_leaves(model(x))
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator).double() for o in outputs])
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_of_all_and_what_is_behind_of_the_kept(name):
    model, x = Net(LOSSES[name]).double(), torch.randn(N, 5).double()
    gm, report = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), (x,))
    assert report.examples.off == ""
    with recorded(choice_of(gm)) as taken:
        ours = backward(gm, x)
    model.chosen = taken[0][1:]
    assert_same(ours, backward(model, x), 1e-9)
    model.chosen = None
    assert differ(ours, backward(model, x))


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_behind_the_sum_are_refused(name):
    model, x = Net(REFUSED[name]).double(), torch.randn(N, 5).double()
    gm, report = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), (x,))
    assert report.examples.off
    assert_same(backward(gm, x), backward(model, x), 1e-12)
