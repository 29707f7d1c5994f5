"""What joins examples in unusual ways is refused, with its line, or its gradients are right: never wrong ones."""

import copy
import linecache
import math

import pytest
import torch
import torch.nn.functional as F
from kept_rows import assert_same, choice_of, differ, masked, recorded
from torch import nn
from torch.utils import _pytree

import fxprop

pytestmark = pytest.mark.short

N = 6
ORDER = torch.tensor([1, 0, 2, 3, 5, 4])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    """`rest(net, hidden)` is the end of the forward."""

    def __init__(self, rest):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tokens = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("table", torch.randn(N, 8))
        self.rest = rest

    def forward(self, x):
        return self.rest(self, self.a(x).tanh())


def backward_by(change):
    """A function of autograd that is the same number in the forward, and changes the gradient."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return change(grad)

    return Changed.apply


reverse = backward_by(lambda grad: -grad)
divide = backward_by(lambda grad: grad / grad.shape[0])
divide_by_tensor = backward_by(lambda grad: grad / torch.full((), grad.shape[0], dtype=grad.dtype))
number = backward_by(lambda grad: grad * torch.arange(grad.shape[0], dtype=grad.dtype)[:, None])
centre = backward_by(lambda grad: grad - grad.mean(0))
normalise = backward_by(lambda grad: grad / grad.norm())


def set_first(z, where):
    z = z.clone()
    z[where] = 0.0
    return z


# each may be refused; in a comment, what it does to the examples
PROGRAMS = {
    # two of one vector, of different examples
    "pairs of a concatenation": lambda net, z: torch.cat([net.b(z), net.c(z)], 0).view(-1, 2, 8),
    "first half of the flat ones": lambda net, z: torch.stack([z, net.b(z)], 1).flatten(0, 1)[: len(z)],
    "pairs": lambda net, z: net.b(z).view(-1, 2, 8).sum(1).repeat_interleave(2, 0),
    "both": lambda net, z: net.c(torch.cat([z, z.sin()])).chunk(2),
    "shift": lambda net, z: net.c(F.pad(z, (0, 0, 1, 0))[:-1]),
    # looked up in those of others
    "embedding": lambda net, z: F.embedding(ORDER, net.b(z)),
    "mixup": lambda net, z: net.c(0.3 * z + 0.7 * z[ORDER]),
    "index_select": lambda net, z: net.c(z.index_select(0, ORDER)),
    "gather": lambda net, z: net.c(z.gather(0, ORDER[:, None].expand(-1, 8))),
    "scatter": lambda net, z: torch.zeros_like(z).scatter(0, ORDER[:, None].expand(-1, 8), net.b(z)),
    "index_add": lambda net, z: torch.zeros_like(z).index_add(0, ORDER, net.b(z)),
    "index_put": lambda net, z: torch.zeros_like(z).index_put((ORDER,), net.b(z)),
    # by their number
    "1 / number": lambda net, z: net.c(z) * (1.0 / len(z)),
    "root of the number": lambda net, z: net.c(z) * math.sqrt(len(z)),
    "power of the number": lambda net, z: net.c(z) * len(z) ** -0.5,
    "divided in the backward": lambda net, z: net.c(divide(net.b(z))),
    "divided by a tensor in the backward": lambda net, z: net.c(divide_by_tensor(net.b(z))),
    "numbered in the backward": lambda net, z: net.c(number(net.b(z))),
    # by what all are
    "centred in the backward": lambda net, z: net.c(centre(net.b(z))),
    "normalised in the backward": lambda net, z: net.c(normalise(net.b(z))),
    "largest": lambda net, z: net.c(z - z.max(0).values),
    "gate": lambda net, z: net.c(z * net.b(z).mean(0).sigmoid()),
    "regulariser added": lambda net, z: net.c(z) + net.b(z).square().sum(),
    "covariance": lambda net, z: net.c(z) @ (z.T @ z),
    "attention": lambda net, z: F.scaled_dot_product_attention(*(3 * [net.b(z)[None, None]]))[0, 0],
    "convolution": lambda net, z: (
        F.conv1d(net.b(z).T[None], net.tokens.expand(8, 4, 8).mT[..., :3], None, 1, 1)[0].T
    ),
    "a weight of each": lambda net, z: F.conv1d(
        z.view(1, -1, 8), net.b(z).view(-1, 1, 8)[..., :3], groups=len(z), padding=1
    ).view(-1, 8),
    "buffer as long as the mini-batch": lambda net, z: net.c(z) * net.table,
    "first one set": lambda net, z: net.c(set_first(net.b(z), 0)),
}
# of each example by itself: must not be refused
APART = {
    "pairs in order": lambda net, z: torch.cat([net.b(z), net.c(z)], 0).view(2, -1, 8).transpose(0, 1),
    "chain of outputs": lambda net, z: (z, net.b(z), net.c(net.b(z).relu())),
    "one output three times": lambda net, z: (lambda y: (y, y, y.view(-1, 2, 4)))(net.b(z)),
    "reversed in the backward": lambda net, z: net.c(reverse(net.b(z))),
    "flat tokens": lambda net, z: net.c((net.b(z)[:, None] * net.tokens).view(-1, 8)),
    "numbered": lambda net, z: net.c(z * torch.arange(len(z))[:, None]),
    "mean without a gradient": lambda net, z: net.c(z - z.mean(0).detach()),
    "norm without a gradient": lambda net, z: net.c(z / z.norm().detach()),
    "threshold of all": lambda net, z: net.c(z) * (z >= z.flatten().topk(5).values.min()),
    "counts of all": lambda net, z: net.c(z) * net.b(z).argmax(1).bincount(minlength=8),
    "ranks among all": lambda net, z: net.c(z) * z.argsort(0),
    "similarity": lambda net, z: F.cosine_similarity(net.b(z)[:, None], net.tokens, dim=-1),
    "strides": lambda net, z: net.c(z.as_strided((z.shape[0], 8), (8, 1))),
    "columns": lambda net, z: F.batch_norm(net.c(z).T, None, None, training=True).T,
    "one feature set": lambda net, z: net.c(set_first(net.b(z), (slice(None), 0))),
}


def backward(model, x, chosen=None):
    """Gradients by name; those of the outputs are random, and masked by hand if `chosen`."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    outputs = _pytree.tree_leaves(model(x))
    grads = [torch.randn(output.shape, generator=generator).double() for output in outputs]
    if chosen is not None:
        grads = [masked(grad.view(N, -1), *chosen).view(grad.shape) for grad in grads]
    torch.autograd.backward(outputs, grads)
    return {name: p.grad for name, p in model.named_parameters()}


def taken_by(rest):
    """(a model, its input, ours, why ours takes all examples)"""
    model, x = Net(rest).double(), torch.randn(N, 5).double()
    gm, report = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), (x,))
    return model, x, gm, report.examples.off


def check(model, x, gm):
    with recorded(choice_of(gm)) as taken:
        ours = backward(gm, x)
    assert_same(ours, backward(model, x, taken[0][1:]), 1e-9)
    assert differ(ours, backward(model, x))


@pytest.mark.parametrize("name", PROGRAMS)
def test_refused_or_right(name):
    model, x, gm, off = taken_by(PROGRAMS[name])
    if off:
        assert_same(backward(gm, x), backward(model, x), 1e-12)
    else:
        check(model, x, gm)


@pytest.mark.parametrize("name", APART)
def test_not_refused(name):
    model, x, gm, off = taken_by(APART[name])
    assert off == ""
    check(model, x, gm)


def test_two_flat_outputs_in_different_orders():
    # of one shape: [2 n, 8]
    def rest(net, z):
        return net.b(z).repeat_interleave(2, 0), torch.cat([net.b(z), net.c(z)], 0)

    model, x, gm, off = taken_by(rest)
    if off:
        return
    with recorded(choice_of(gm)) as taken:
        ours = backward(gm, x)
    chosen = taken[0][1:]
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    outputs = model(x)
    first, second = (torch.randn(o.shape, generator=generator).double() for o in outputs)
    first = masked(first.view(N, -1), *chosen).view(-1, 8)
    second = masked(second.view(2, N, 8).transpose(0, 1), *chosen).transpose(0, 1).reshape(-1, 8)
    torch.autograd.backward(outputs, [first, second])
    assert_same(ours, {name: p.grad for name, p in model.named_parameters()}, 1e-9)


PAIRED = {
    "products": lambda net, z: net.b(z) @ z.T,
    "einsum": lambda net, z: torch.einsum("nc,mc->nm", net.b(z), z),
    "distances": lambda net, z: (net.b(z)[:, None] - z).norm(dim=-1),
}


@pytest.mark.parametrize("name", PAIRED)
def test_two_batch_dimensions_are_refused_with_their_line(name):
    _, _, _, off = taken_by(PAIRED[name])
    assert linecache.getline(__file__, PAIRED[name].__code__.co_firstlineno).strip() in off


def test_a_wrong_gradient_would_be_seen():
    model, x, gm, _ = taken_by(APART["reversed in the backward"])
    model.rest = PROGRAMS["mixup"]
    with pytest.raises(AssertionError, match=r"'b.weight'"):
        check(model, x, gm)


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.centres = nn.Linear(5, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return torch.cdist(self.a(x), self.centres)


def test_the_line_is_one_of_the_model():
    _, report = fxprop.transform(Distances(), fxprop.Policy(examples=0.5), (torch.randn(N, 5),))
    assert "torch.cdist(self.a(x), self.centres)" in report.examples.off or not report.examples.off
