"""Gradients by shifted copies of few output channels, against the convolution's own kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprop.ops.kernels import few_channels


def reference(grad, x, weight, padding, dilation):
    ones, zeros = [1] * len(padding), [0] * len(padding)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, ones, padding, dilation, False, zeros, 1, [True, True, False]
    )[:2]


@settings(max_examples=80, deadline=None)
@given(
    dims=st.sampled_from([1, 2, 3]),
    data=st.data(),
    k=st.integers(1, 4),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_are_the_kernels_own(dims, data, k, channels_last, seed):
    draw = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(dims)]  # noqa: E731
    size, kernel, padding, dilation = draw(5, 7), draw(1, 3), draw(0, 3), draw(1, 2)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    spans = zip(size, kernel, padding, dilation, strict=True)
    out = [s + 2 * p - d * (taps - 1) for s, taps, p, d in spans]
    x, weight, grad = randn(2, 3, *size), randn(k, 3, *kernel), randn(2, k, *out)
    if channels_last and dims > 1:
        layout = torch.channels_last if dims == 2 else torch.channels_last_3d
        x, grad = x.to(memory_format=layout), grad.to(memory_format=layout)
    for needs in ((True, True), (True, False), (False, True)):
        got = few_channels.gradients(grad, x, weight, padding, dilation, *needs)
        wanted = reference(grad, x, weight, padding, dilation)
        for needed, ours, theirs in zip(needs, got, wanted, strict=True):
            assert (ours is not None) == needed
            if needed:
                torch.testing.assert_close(ours, theirs)


def test_the_comparison_sees_a_shift():
    x, weight, grad = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 3, 3), torch.randn(2, 2, 6, 6)
    wanted = reference(grad, x, weight, [1, 1], [1, 1])
    got = few_channels.gradients(grad.roll(1, 2), x, weight, [1, 1], [1, 1], True, True)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(got[0], wanted[0])


@pytest.mark.parametrize(
    ("k", "size", "stride", "groups", "dtype", "yes"),
    [
        (3, 56, 1, 1, torch.float32, True),
        (13, 14, 1, 1, torch.float32, True),
        (16, 56, 1, 1, torch.float32, False),  # a whole block
        (26, 7, 1, 1, torch.float32, False),  # little wasted on a small image
        (3, 7, 1, 1, torch.float32, True),
        (3, 56, 2, 1, torch.float32, False),
        (3, 56, 1, 2, torch.float32, False),
        (3, 56, 1, 1, torch.bfloat16, False),
    ],
)
def test_where_it_applies(k, size, stride, groups, dtype, yes):
    x, weight = torch.empty(2, 64, size, size, dtype=dtype), torch.empty(k, 64, 3, 3, dtype=dtype)
    grad = torch.empty(2, k, size // stride, size // stride, dtype=dtype)
    assert few_channels.applies(grad, x, weight, [stride] * 2, groups) is yes
    assert not few_channels.applies(grad[..., 1:], x, weight, [stride] * 2, groups)
