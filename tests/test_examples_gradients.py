"""Gradients of kept examples are those of a dense backward whose output gradients are masked by hand."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from kept_rows import SELECTS, TOLERANCE, assert_same, choice_of, differ, gradients, leaves, recorded
from torch import nn

import fxprop
from fxprop.errors import PolicyError

N = 6


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Attention(nn.Module):
    """nn.MultiheadAttention on [n, tokens, width], with tokens first inside if wanted."""

    def __init__(self, width, batch_first=True, dropout=0.0):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=batch_first, dropout=dropout)

    def forward(self, x):
        if not self.inner.batch_first:
            x = x.transpose(0, 1)
        x = x + self.inner(x, x, x)[0]
        return x if self.inner.batch_first else x.transpose(0, 1)


class Scaled(nn.Module):
    """F.scaled_dot_product_attention, causal or not."""

    def __init__(self, width, causal=False):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = (part.view(n, length, 2, width // 2).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Tokens(nn.Module):
    """[n, channels, height, width] as [n, places, channels]."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of images."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def of_images(width, dropout):
    """Layers that leave the shape of images as it is."""
    return [
        lambda: nn.Conv2d(width, width, 3, padding=1),
        lambda: nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False),
        lambda: Residual(nn.Conv2d(width, width, 1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)),
        lambda: nn.Sequential(nn.GroupNorm(2, width), nn.ReLU()),
        lambda: ChannelNorm(width),
        lambda: nn.Sequential(nn.InstanceNorm2d(width, affine=True), nn.SiLU()),
        lambda: nn.Dropout(dropout),
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.AvgPool2d(3, 2, 1)),
    ]


def of_tokens(width, dropout):
    """Layers that leave the shape of token sequences as it is."""
    return [
        lambda: nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
        lambda: Residual(nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)),
        lambda: Attention(width, dropout=dropout),
        lambda: Attention(width, batch_first=False, dropout=dropout),
        lambda: Scaled(width),
        lambda: Scaled(width, causal=True),
        lambda: nn.Sequential(nn.LayerNorm(width), nn.Tanh()),
    ]


def network(seed, dropout=0.25):
    """(a random network, its inputs), in float64 or float32."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    width = draw.choice([4, 8])
    if draw.random() < 0.6:
        images = draw.choices(of_images(width, dropout), k=draw.randint(1, 3))
        layers = [
            nn.Conv2d(3, width, 3, stride=draw.choice([1, 2])),
            *(make() for make in images),
            Tokens(),
        ]
        inputs = torch.randn(N, 3, 7, 7)
    else:
        layers, inputs = [nn.Embedding(12, width)], torch.randint(0, 12, (N, 5))
    layers += [make() for make in draw.choices(of_tokens(width, dropout), k=draw.randint(0, 1))]
    layers += [nn.Linear(width, 3), *draw.choice([[], [Mean()]])]
    dtype = draw.choice([torch.float64, torch.float64, torch.float32])
    return nn.Sequential(*layers).to(dtype), [inputs.to(dtype) if inputs.is_floating_point() else inputs]


def transformed(model, inputs, **settings):
    """Ours, and what chooses its examples; half of them unless `settings` say another share."""
    policy = fxprop.Policy(**{"keep": 1.0, "examples": 0.5, **settings})
    gm, _ = fxprop.transform(copy.deepcopy(model), policy, tuple(leaves(inputs)))
    return gm, choice_of(gm)


def output_gradient(model, inputs):
    """Random, of examples that matter more and less."""
    output = model(*inputs)
    scale = torch.rand(len(output), dtype=output.dtype) + 0.1
    return torch.randn_like(output) * scale.view(-1, *[1] * (output.dim() - 1))


def check(model, inputs, rounded=False):
    """All three ways of choosing give the gradients of the dense backward by hand; outputs to the bit."""
    gm, choice = transformed(model, inputs)
    grad = output_gradient(model, inputs)
    for choice.select in SELECTS:
        with recorded(choice) as taken:
            output, ours = gradients(gm, inputs, grad)
        ((_, examples, weights),) = taken
        assert choice.last == (N // 2, N)
        assert len(examples) == N // 2
        expected, theirs = gradients(model, inputs, grad, 0, examples, weights)
        assert torch.equal(output, expected) or rounded, (output - expected).abs().max()
        torch.testing.assert_close(output, expected)
        assert_same(ours, theirs, TOLERANCE[grad.dtype])


@pytest.fixture(autouse=True)
def forgotten():
    """What torch.compile has learnt of earlier shapes, each test starts without."""
    torch._dynamo.reset()


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed):
    check(*network(seed))


X = torch.randn(N, 5, 8, generator=torch.Generator().manual_seed(0)).double()
IMAGES = torch.randn(N, 4, 7, 7, generator=torch.Generator().manual_seed(0)).double()
LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), X),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(150, 3)), IMAGES),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2), nn.Flatten()), IMAGES),
    "attention": (lambda: Attention(8, dropout=0.2), X),
    "attention, tokens first": (lambda: Attention(8, batch_first=False), X),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True), X),
    "scaled dot product": (lambda: Scaled(8, causal=True), X),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 1)), IMAGES),
    "instance norm": (lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 2, 1)), IMAGES),
    "dropout": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 3)), X),
    "lstm": (lambda: Recurrent(), X),
}


class Recurrent(nn.Module):
    """Weights used once per token."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for token in x.unbind(1):
            state = self.cell(torch.cat([token, state], 1)).tanh()
        return self.out(state)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    torch.manual_seed(0)
    build, x = LAYERS[name]
    check(build().double(), [x])


def test_interpolation_is_made_of_other_operators():
    # torch does that wherever it traces with symbols; the guide says so
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(6, 2, 1)
    )
    check(model.double(), [IMAGES], rounded=True)


@pytest.mark.parametrize("where", ["policy", "rule"])
def test_rows_are_not_chosen_among_chosen_examples(where):
    given = {"select": "row"} if where == "policy" else {"rules": [fxprop.Rule(name="fc", select="row")]}
    with pytest.raises(PolicyError, match=r"examples=0\.5 and select='row': rows are chosen among"):
        fxprop.Policy(keep=0.5, examples=0.5, **given)


def test_the_oracle_can_fail():
    model, inputs = network(4)
    gm, choice = transformed(model, inputs)
    grad = output_gradient(model, inputs)
    with recorded(choice) as taken:
        _, ours = gradients(gm, inputs, grad)
    ((_, examples, weights),) = taken
    wrong = {
        "mask": ((examples + 1) % N, weights),
        "weights": (examples, weights * 1.01),
        "no weights": (examples, None),
        "one too few": (examples[1:], weights[1:]),
    }
    for what, (others, factors) in wrong.items():
        assert differ(ours, gradients(model, inputs, grad, 0, others, factors)[1]), what
    assert not differ(ours, gradients(model, inputs, grad, 0, examples, weights)[1])


def on_kept_alone(gm, inputs, grad, examples, weights):
    """Gradients of a sparse module that gets the kept examples as its mini-batch."""
    fxprop.set_keep(gm, examples=1.0)
    weighted = grad[examples]
    if weights is not None:
        weighted = weighted * weights.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1))
    _, found = gradients(gm, [x[examples] for x in inputs], weighted)
    fxprop.set_keep(gm, examples=0.5)
    for i, x in enumerate(inputs):
        if x.is_floating_point():
            part = found[f"input {i}"]
            found[f"input {i}"] = torch.zeros_like(x).index_copy_(0, examples, part)
    return found


@pytest.mark.parametrize("sparse", ["channel", "element"])
@pytest.mark.parametrize("seed", [0, 4, 15])
def test_channels_of_the_kept_examples(seed, sparse):
    model, inputs = network(seed, dropout=0.0)
    gm, choice = transformed(model, inputs, keep=0.5, select=sparse, when="always")
    grad = output_gradient(model, inputs)
    for choice.select in SELECTS:
        with recorded(choice) as taken:
            _, ours = gradients(gm, inputs, grad)
        ((_, examples, weights),) = taken
        theirs = on_kept_alone(gm, inputs, grad, examples, weights)
        assert_same(ours, theirs, TOLERANCE[grad.dtype])
    # of fewer channels: those of the dense backward differ
    assert differ(ours, gradients(model, inputs, grad, 0, examples, weights)[1])
