"""Operators that keep examples apart, as they are and recomputed in the backward; tensors and their rows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_rows import assert_same, choice_of, gradients, recorded
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxprop
from fxprop.compact.rows import Rows, without_gaps

N = 4
TOKENS = (N, 5, 8)
IMAGES = (N, 4, 6, 6)
VOLUMES = (N, 2, 4, 4, 4)
IDS = torch.tensor([[0, 3, 1, 1, 7], [2, 2, 5, 6, 7], [1, 0, 0, 4, 3], [5, 5, 5, 5, 5]])


def attend(x, weight):
    heads = x.view(len(x), 5, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads * 2, heads.sin(), is_causal=True)


def masked_attend(x, weight):
    heads = x.view(len(x), 5, 2, 4).transpose(1, 2)
    mask = (x[:, None, :, :5] > 0) | torch.eye(5, dtype=torch.bool)
    return F.scaled_dot_product_attention(heads, heads * 2, heads.sin(), attn_mask=mask)


def sampled(x, weight):
    grid = torch.stack([x[:, 0], x[:, 1]], -1).tanh()
    return F.grid_sample(x, grid, align_corners=False)


def attended_by_hand(x, weight):
    return torch.einsum("btc,bsc->bts", x @ weight[:8, :8], x).softmax(-1) @ x


def recurrent(x, weight):
    state = x[:, 0] * 0
    for token in x.unbind(1):
        state = torch.addmm(token, state, weight[:8, :8]).tanh()
    return state


OPERATORS = {
    "view of tokens": (TOKENS, lambda x, w: (x.reshape(-1, 8) @ w[:8, :8]).view(-1, 5, 8)),
    "tokens first": (
        TOKENS,
        lambda x, w: (x.transpose(0, 1).reshape(-1, 8) @ w[:8, :8]).view(5, -1, 8).transpose(0, 1),
    ),
    "windows": (
        IMAGES,
        lambda x, w: (
            x.view(-1, 4, 2, 3, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 9) @ w[:9, :9]
        ).view(-1, 144),
    ),
    "softmax": (TOKENS, lambda x, w: x.softmax(-1) * w[:8, 0]),
    "log_softmax": (TOKENS, lambda x, w: x.log_softmax(1)),
    "logsumexp": (TOKENS, lambda x, w: x.logsumexp(2)),
    "layer norm": (TOKENS, lambda x, w: F.layer_norm(x, (5, 8), w[:5, :8])),
    "rms norm": (TOKENS, lambda x, w: F.rms_norm(x, (8,), w[0, :8])),
    "group norm": (IMAGES, lambda x, w: F.group_norm(x, 2, w[0, :4])),
    "convolution": (IMAGES, lambda x, w: F.conv2d(x, w[:6, :36].reshape(6, 4, 3, 3))),
    "transposed convolution": (IMAGES, lambda x, w: F.conv_transpose2d(x, w[:4, :18].reshape(4, 2, 3, 3))),
    "conv1d": (TOKENS, lambda x, w: F.conv1d(x, w[:4, :10].reshape(4, 5, 2))),
    "conv3d": (VOLUMES, lambda x, w: F.conv3d(x, w[:3, :16].reshape(3, 2, 2, 2, 2))),
    "max_pool1d": (TOKENS, lambda x, w: F.max_pool1d(x, 2)),
    "max_pool2d": (IMAGES, lambda x, w: F.max_pool2d(x, 3, 2, 1)),
    "max_pool3d": (VOLUMES, lambda x, w: F.max_pool3d(x, 2)),
    "avg_pool1d": (TOKENS, lambda x, w: F.avg_pool1d(x, 2)),
    "avg_pool2d": (IMAGES, lambda x, w: F.avg_pool2d(x, 2)),
    "avg_pool3d": (VOLUMES, lambda x, w: F.avg_pool3d(x, 2)),
    "adaptive pools": (IMAGES, lambda x, w: F.adaptive_avg_pool2d(x, 4) + F.adaptive_max_pool2d(x, 4)),
    "pads": (
        IMAGES,
        lambda x, w: (
            F.pad(x, (1, 2, 0, 1))
            + F.pad(x, (1, 2, 0, 1), "reflect")
            + F.pad(x, (1, 2, 0, 1), "replicate")
            + F.pad(x, (1, 2, 0, 1), "circular")
        ),
    ),
    "upsampling": (IMAGES, lambda x, w: F.interpolate(x, scale_factor=2)),
    "bicubic": (IMAGES, lambda x, w: F.interpolate(x, size=(7, 9), mode="bicubic")),
    "pixel shuffle": (IMAGES, lambda x, w: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 3)),
    "unfold and fold": (IMAGES, lambda x, w: F.fold(F.unfold(x, 3) * 2, (6, 6), 3)),
    "unfold": (TOKENS, lambda x, w: x.unfold(1, 3, 1)),
    "gather": (TOKENS, lambda x, w: x.gather(1, x.argsort(1))),
    "scatter": (TOKENS, lambda x, w: torch.zeros_like(x).scatter(2, x.argsort(2), x)),
    "sort": (TOKENS, lambda x, w: x.sort(2).values),
    "topk": (TOKENS, lambda x, w: x.topk(3, 2).values),
    "index": (TOKENS, lambda x, w: x[:, torch.tensor([0, 2, 2])]),
    "index_select": (TOKENS, lambda x, w: x.index_select(1, torch.tensor([1, 0]))),
    "embedding": (TOKENS, lambda x, w: F.embedding(x[..., 0].abs().long().clamp_max(3), w[:, :8]) + x),
    "one entry each": (TOKENS, lambda x, w: x[torch.arange(len(x)), x[:, :, 0].argmax(1)]),
    "cumsum": (TOKENS, lambda x, w: x.cumsum(1) + x.cumprod(2)),
    "flip and roll": (TOKENS, lambda x, w: x.flip(1) * x.roll(2, 2)),
    "attention": (TOKENS, attend),
    "attention with a mask": (TOKENS, masked_attend),
    "attention by hand": (TOKENS, attended_by_hand),
    "recurrence": (TOKENS, recurrent),
    "grid_sample": (IMAGES, sampled),
    "prelu": (IMAGES, lambda x, w: F.prelu(x, w[0, :4])),
    "glu": (TOKENS, lambda x, w: F.glu(x, 2)),
    "activations": (
        TOKENS,
        lambda x, w: (
            F.gelu(x) * F.silu(x)
            + F.hardswish(x) * F.mish(x)
            + F.elu(x) * F.softplus(x)
            + F.leaky_relu(x)
            + F.hardtanh(x)
        ),
    ),
    "cat and stack": (
        TOKENS,
        lambda x, w: torch.stack([torch.cat([x, x * 2], 1), torch.cat([x.sin(), x], 1)], 1),
    ),
    "chunks": (TOKENS, lambda x, w: x.chunk(2, 2)[0] * x.split([3, 5], 2)[1][..., :4]),
    "slices": (TOKENS, lambda x, w: x[:, 1:, ::2] + x[:, :1, :4]),
    "expand": (TOKENS, lambda x, w: x[:, :1].expand(-1, 5, -1) + w[:8, 0].expand(5, 8)),
    "norms": (
        TOKENS,
        lambda x, w: F.normalize(x, dim=-1) + x.var(1, keepdim=True) + x.std(2, keepdim=True),
    ),
    "extremes": (TOKENS, lambda x, w: x.amax(1) + x.min(1).values + x.median(1).values),
    "bmm and baddbmm": (TOKENS, lambda x, w: torch.baddbmm(x, x, (x.mT @ x))),
    "cdist": (TOKENS, lambda x, w: (x[:, :, None] - x[:, None]).square().sum(-1)),
    "outer product": (TOKENS, lambda x, w: torch.einsum("ntc,ntd->ncd", x, x)),
    "where": (TOKENS, lambda x, w: torch.where(x > 0, x, w[:5, :8]).masked_fill(x > 1, 0.0)),
    "bilinear": (TOKENS, lambda x, w: F.bilinear(x, x, w[:6].flatten()[:192].view(3, 8, 8))),
    "complex": (TOKENS, lambda x, w: torch.fft.rfft(x, dim=1).abs()),
}
# what is refused though the examples are apart
REFUSED = {
    "complex": "is not known to keep them apart",
    "bilinear": "is not known to keep them apart",
    "one entry each": "examples: aten.",
}


class One(nn.Module):
    """An operator between layers, recomputed in the backward or not."""

    def __init__(self, shape, function, recomputed):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape[1:]))
        self.weight = nn.Parameter(torch.randn(9, 40) / 3)
        self.function, self.recomputed = function, recomputed

    def forward(self, x):
        x = x * self.scale
        if not self.recomputed:
            return self.function(x, self.weight)
        return checkpoint(self.function, x, self.weight, use_reentrant=False).sin()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name, recomputed):
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape, function = OPERATORS[name]
    model, x = One(shape, function, recomputed).double(), torch.randn(shape).double()
    gm, report = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), (x.requires_grad_(),))
    if name in REFUSED:
        assert REFUSED[name] in report.examples.off
        return
    grad = torch.randn_like(model(x))
    choice = choice_of(gm)
    with recorded(choice) as taken:
        output, ours = gradients(gm, [x], grad)
    expected, theirs = gradients(model, [x], grad, 0, *taken[0][1:])
    torch.testing.assert_close(output, expected)
    assert_same(ours, theirs, 1e-9)


@st.composite
def tensors(draw):
    """(a tensor, where its examples lie, how many there are, some of them)"""
    n = draw(st.integers(2, 5))
    outer, inner = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]))
    sizes = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    dim = draw(st.integers(0, len(sizes)))
    shape = [*sizes[:dim], outer * n * inner, *sizes[dim:]]
    order = draw(st.permutations(range(len(shape)))) if outer == inner == 1 else list(range(len(shape)))
    tensor = torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    expanded = [d for d in range(len(shape)) if d != dim and shape[d] > 1]
    if outer == inner == 1 and expanded and draw(st.booleans()):
        tensor = tensor.narrow(expanded[0], 0, 1).expand(shape)
    wanted = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True).map(sorted))
    unknown = draw(st.sampled_from(["outer", "inner", None]))
    rows = Rows(dim, -1 if unknown == "outer" else outer, -1 if unknown == "inner" else inner)
    return tensor, rows, n, torch.tensor(wanted), (outer, inner)


@settings(deadline=None)
@given(tensors())
def test_rows_are_those_of_plain_indexing(case):
    tensor, rows, n, wanted, (outer, inner) = case
    dim = rows.dim
    apart = tensor.contiguous().view(*tensor.shape[:dim], outer, n, inner, *tensor.shape[dim + 1 :])
    plain = apart[(slice(None),) * (dim + 1) + (wanted,)].flatten(dim, dim + 2)
    taken = rows.take(tensor, wanted, n)
    assert torch.equal(taken, plain)
    back = rows.put_back(taken, wanted, n)
    assert torch.equal(rows.take(back, wanted, n), plain)
    assert torch.count_nonzero(back) == torch.count_nonzero(plain)
    weights = torch.arange(1.0, len(wanted) + 1)
    weighed = rows.weigh(taken, weights)
    torch.testing.assert_close(rows.norms(weighed, len(wanted)), rows.norms(taken, len(wanted)) * weights)
    others = [d for d in range(apart.dim()) if d != dim + 1]
    torch.testing.assert_close(rows.norms(tensor, n), apart.square().sum(others).sqrt())


@settings(deadline=None)
@given(tensors())
def test_all_rows_have_the_strides_of_some(case):
    tensor, rows, n, _, _ = case
    every = without_gaps(tensor)
    assert torch.equal(every, tensor)
    again = rows.take(every, torch.arange(n), n)
    assert [every.stride(d) for d, size in enumerate(every.shape) if size > 1] == [
        again.stride(d) for d, size in enumerate(again.shape) if size > 1
    ]
