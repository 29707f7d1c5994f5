"""An independent reading of the semantics: dense autograd with grad_output masked by hand.

Nothing here uses fxprop. Selection is by sorting and loops; gradients are autograd's own.
"""

import math
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Keep:
    """What a masked operator keeps: a share (or k) of grad_output."""

    keep: float | None = None
    k: int | None = None
    select: str = "channel"
    score: str = "l1"
    bias: str = "full"
    round_to: int = 1
    score_fraction: float = 1.0

    def count(self, n):
        k = self.k if self.k is not None else max(1, math.floor(self.keep * n + 0.5))
        return min(n, math.ceil(k / self.round_to) * self.round_to)


# of the entries of one feature; "least" is registered in tests/operators.py
SCORES = {
    "l1": lambda entries: entries.abs().sum().item(),
    "l2": lambda entries: entries.square().sum().sqrt().item(),
    "least": lambda entries: -entries.abs().sum().item(),
}


class Tie(Exception):
    """Features that have the same score, or none: any choice among them is right."""


def largest(scores, k):
    """Positions of the k largest of a list of numbers."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def mask(grad, keep, features, examples, scored=None):
    """0/1 mask of `grad`. Two functions say what its positions are, given a tensor of their numbers.

    `features` gives a list of [examples, positions, features], each with a choice of its own; `examples`
    the rows [examples, n] that single elements are chosen from. `scored` is looked at in place of `grad`.
    """
    kept = torch.zeros(grad.numel(), dtype=grad.dtype)
    numbers = torch.arange(grad.numel()).view(grad.shape)
    entries = (grad if scored is None else scored).flatten()
    if keep.select == "element":
        sign = -1 if keep.score == "least" else 1
        for row in examples(numbers):
            scores = (sign * entries[row].abs()).tolist()
            kept[row[largest(scores, keep.count(len(row)))]] = 1
        return kept.view(grad.shape)
    for run in features(numbers):
        first = run[: math.ceil(keep.score_fraction * len(run))].flatten(0, 1)
        scores = [SCORES[keep.score](of_feature) for of_feature in entries[first.t()]]
        k = keep.count(run.shape[2])
        if len(first) and k < len(scores):
            last, dropped = sorted(scores, reverse=True)[k - 1 : k + 1]
            if last - dropped < 1e-10 * max(map(abs, scores)) or (
                last == dropped and len(first) < run[..., 0].numel()
            ):
                raise Tie
        kept[run[..., largest(scores, k)]] = 1
    return kept.view(grad.shape)


def runs_of_channels(groups):
    """`features` of [N, C_out, *spatial]: one run for each group."""

    def features(numbers):
        # a group of one channel is kept or dropped as a whole
        runs = 1 if groups == numbers.shape[1] else groups
        return [run.flatten(2).mT for run in numbers.chunk(runs, 1)]

    return features


def conv_mask(grad, groups, keep, scored=None):
    """0/1 mask of grad [N, C_out, *spatial]."""
    return mask(grad, keep, runs_of_channels(groups), lambda numbers: numbers.flatten(1), scored)


def linear_mask(grad, keep):
    """0/1 mask of grad [*, out_features]."""
    size = grad.shape[-1]
    return mask(grad, keep, lambda n: [n.reshape(-1, 1, size)], lambda n: n.reshape(-1, size))


def of_first_examples(grad, y, gamma, eps, keep):
    """What the channels in front of batch-norm are scored by: the first examples as if they were the batch.

    `grad` is that behind the norm, y what the norm gets, of the whole batch; its mean and deviation are.
    Raises Tie where the sums that l2 is made of say that nothing is left of a channel.
    """
    dims = [d for d in range(y.dim()) if d != 1]
    variance = y.var(dims, correction=0, keepdim=True) + eps
    count = math.ceil(keep.score_fraction * len(y))
    xhat = ((y - y.mean(dims, keepdim=True)) / variance.sqrt())[:count]
    part = grad[:count]
    scale = 1 if gamma is None else gamma.view([-1 if d == 1 else 1 for d in range(y.dim())])
    found = torch.zeros_like(y)
    if keep.score == "l1":
        shift, slope = part.mean(dims, keepdim=True), (part * xhat).mean(dims, keepdim=True)
        found[:count] = (part - shift - xhat * slope) * scale / variance.sqrt()
        return found
    # of a batch of its own the normalised values have the sum 0 and the mean square (variance - eps) / variance
    entries = part.numel() // part.shape[1]
    sums = [t.sum(dims, keepdim=True).square() for t in (part, part * xhat)]
    dropped = (sums[0] + (1 + eps / variance) * sums[1]) / entries
    square = part.square().sum(dims, keepdim=True) - dropped
    if ((square < 1e-9) & (part.square().sum(dims, keepdim=True) > 1e-9)).any():
        raise Tie
    square = square.clamp_min(0) * scale**2 / variance
    found[(slice(0, 1), slice(None), *[slice(0, 1)] * (y.dim() - 2))] = square.sqrt()
    return found


def masked(output, bias, bias_shape, keep, mask):
    """output + bias, with the gradient of `output` masked; the bias sees what `keep.bias` says."""
    if bias is not None and keep.bias == "selected":
        output = output + bias.view(bias_shape)
    # a tensor of its own, not a view: an in-place activation that follows would take a view's hook away
    output = output * 1
    if output.requires_grad:
        output.register_hook(lambda grad: grad * mask(grad))
    if bias is not None and keep.bias == "full":
        output = output + bias.view(bias_shape)
    return output


def masked_linear(keep):
    """F.linear with its gradient masked."""

    def linear(input, weight, bias=None):
        y = F.linear(input, weight)
        return masked(y, bias, (-1,), keep, lambda g: linear_mask(g, keep))

    return linear


def masked_conv(dims, keep, mask=None):
    """F.conv{dims}d with its gradient masked."""
    dense = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
        y = dense(batched, weight, None, stride, padding, dilation, groups)
        shape = (-1,) + (1,) * dims
        y = masked(y, bias, shape, keep, mask or (lambda g: conv_mask(g, groups, keep)))
        return y if input.dim() == dims + 2 else y.squeeze(0)

    return conv


def mask_module(module, keep, mask=None):
    """Make an nn.Conv*d, nn.ConvTranspose*d or nn.Linear mask its output gradient, by `mask` if given."""
    if isinstance(module, nn.Linear):
        linear = masked_linear(keep)
        module.forward = lambda x: linear(x, module.weight, module.bias)
        return
    dims = module.weight.dim() - 2
    if module.transposed:

        def transposed(x):
            m, shape = module, (-1,) + (1,) * dims
            dense = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
            y = dense(x, m.weight, None, m.stride, m.padding, m.output_padding, m.groups, m.dilation)
            return masked(y, m.bias, shape, keep, lambda g: conv_mask(g, m.groups, keep))

        module.forward = transposed
        return
    conv = masked_conv(dims, keep, mask)

    def conv_forward(self, x, weight, bias):
        if self.padding_mode == "zeros":
            return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return conv(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    module._conv_forward = types.MethodType(conv_forward, module)


def mask_region(conv, norm, keep, norm_grad="full"):
    """Make a convolution and the batch-norm behind it mask as one: what the norm gets decides."""
    chosen = []

    def forward(y):
        gamma, beta = (None if p is None else p * 1 for p in (norm.weight, norm.bias))
        for parameter in (gamma, beta):
            if parameter is not None and norm_grad == "kept":
                parameter.register_hook(lambda grad: grad * chosen[0].movedim(1, 0).flatten(1).any(1))
        z = F.batch_norm(
            y, norm.running_mean, norm.running_var, gamma, beta, norm.training, norm.momentum, norm.eps
        )

        def choose(grad):
            with torch.enable_grad():
                again = y.detach().requires_grad_()
                behind = F.batch_norm(again, None, None, norm.weight, norm.bias, True, eps=norm.eps)
            (before,) = torch.autograd.grad(behind, again, grad)
            scored = None
            if keep.score_fraction < 1:
                scored = of_first_examples(grad, y.detach(), norm.weight, norm.eps, keep)
            chosen[:] = [conv_mask(before, conv.groups, keep, scored)]

        if z.requires_grad:
            z.register_hook(choose)
        return z

    norm.forward = forward
    mask_module(conv, keep, lambda grad: chosen[0])


def mask_model(model, keep, except_for=()):
    """Mask every conv and linear of `model` but the named ones; returns the names masked."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and name not in except_for:
            mask_module(module, keep)
            names.append(name)
    return names


def gradients(model, inputs, seed=0):
    """Gradients of a fixed random loss: {parameter name: grad}, [input grads]."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    for parameter in model.parameters():
        parameter.grad = None
    output = model(*inputs)
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    # those that are row-sparse as dense ones
    return {n: g if g is None else g.to_dense() for n, g in grads.items()}, [x.grad for x in inputs]


def assert_same_gradients(ours, theirs, atol=1e-10, rtol=1e-9):
    """Both results of `gradients` agree, parameter by parameter."""
    assert ours[0].keys() == theirs[0].keys()
    for name, grad in ours[0].items():
        expected = theirs[0][name]
        assert (grad is None) == (expected is None), name
        if grad is not None:
            torch.testing.assert_close(
                grad, expected, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
            )
    for grad, expected in zip(ours[1], theirs[1], strict=True):
        if expected is not None:
            torch.testing.assert_close(grad, expected, atol=atol, rtol=rtol)
