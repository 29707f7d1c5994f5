"""Shapes, layouts and dtypes that change from call to call, on part of the mini-batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from kept_rows import assert_same, choice_of, masked, recorded
from torch import nn

import fxprop
from fxprop.inspection.code import backward_code


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.out = (
            nn.Embedding(9, 8),
            nn.Parameter(torch.randn(20, 8)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.out(F.layer_norm(self.words(x) + self.places[: x.shape[1]], (8,)))


class FlatTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh()).view(-1, 3)


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        n, height, width, c = x.shape
        windows = x.view(n, height // 2, 2, width // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        mixed = self.mix(windows).softmax(1).view(n, height // 2, width // 2, 2, 2, c).transpose(2, 3)
        return self.out(mixed.reshape(n, height, width, c) + x).mean((1, 2))


def layers():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def pooled():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def normed():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)
    )


# lengths and sizes vary, some as large as the mini-batch
SEQUENCES = {
    "tokens": (layers, [(6, 7, 5), (8, 8, 5), (6, 9, 5), (4, 4, 5)]),
    "flat tokens": (FlatTokens, [(6, 7, 5), (6, 9, 5), (5, 5, 5)]),
    "words": (Words, [(6, 7), (8, 8), (6, 9), (5, 5)]),
    "images": (pooled, [(6, 3, 8, 8), (12, 3, 12, 12), (4, 3, 9, 12)]),
    "windows": (Windows, [(6, 4, 4, 4), (4, 4, 4, 4)]),
    "windows of several sizes": (Windows, [(6, 4, 4, 4), (6, 8, 8, 4), (6, 6, 8, 4)]),
}


def data(shape):
    return torch.randn(shape).double() if len(shape) > 2 else torch.randint(0, 9, shape)


def check(model, gm, x, tolerance=1e-9, **autocast):
    """Ours are the gradients of the dense backward that is masked by hand; both under autocast if wanted."""

    def backward(module, chosen=None):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
            output = module(x)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        if chosen is not None:
            grad = masked(grad.reshape(len(x), -1), *chosen).view(output.shape)
        output.backward(grad)
        return {name: p.grad for name, p in module.named_parameters()}

    with recorded(choice_of(gm)) as taken:
        ours = backward(gm)
    (one,) = taken
    assert len(one[1]) == (len(x) + 1) // 2
    assert_same(ours, backward(model, one[1:]), tolerance)


def halved(model, x):
    gm, report = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), (x,))
    assert report.examples.off == ""
    return gm


@pytest.mark.parametrize("name", SEQUENCES)
def test_shapes_that_vary(name):
    build, shapes = SEQUENCES[name]
    model = build().double()
    gm = halved(model, data(shapes[0]))
    for shape in shapes:
        check(model, gm, data(shape))


def test_channels_last():
    model = normed().double().to(memory_format=torch.channels_last)
    x = torch.randn(6, 4, 8, 8).double()
    gm = halved(model, x.to(memory_format=torch.channels_last))
    for given in (x.to(memory_format=torch.channels_last), x, x.expand(6, 4, 8, 8), x[:, :, ::2, ::2]):
        check(model, gm, given)


@pytest.mark.parametrize("build", [layers, pooled])
def test_autocast(build):
    model = build()
    x = torch.randn(6, 7, 5) if build is layers else torch.randn(6, 3, 8, 8)
    gm = halved(model, x)
    check(model, gm, x, 2e-2, autocast=True)
    check(model, gm, x, 1e-5)


def test_a_mask_as_long_as_the_mini_batch_is_no_example():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x, mask):
            hidden = self.a(x)
            return self.b((hidden @ hidden.mT).masked_fill(mask, -1e9).softmax(-1) @ hidden)

    # tokens as many as examples; in later calls more
    model, calls = Masked().double(), []
    gm, report = fxprop.transform(
        copy.deepcopy(model),
        fxprop.Policy(examples=0.5),
        (torch.randn(6, 6, 5).double(), torch.ones(6, 6).triu(1).bool()),
    )
    for n, length in ((6, 6), (6, 9), (8, 9)):
        x, mask = torch.randn(n, length, 5).double(), torch.ones(length, length).triu(1).bool()
        for module in (gm, model):
            module.zero_grad()
            module(x, mask).square().sum().backward()
        calls.append(torch.equal(gm.a.weight.grad, model.a.weight.grad))
    assert all(calls) == bool(report.examples.off)


def test_sizes_of_other_calls_are_forgotten():
    # torch.compile makes symbols of sizes that varied between calls of one function
    def cut_of(side):
        model, x = pooled(), torch.randn(6, 3, side, side)
        gm, _ = fxprop.transform(model, fxprop.Policy(examples=0.5), (x,))
        return backward_code(gm)

    alone = cut_of(12)
    cut_of(8)
    assert cut_of(12) == alone
