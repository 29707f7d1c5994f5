"""Layers whose gradients the loops over kept entries compute, and what they are compared with."""

import torch
import torch.nn.functional as F

from fxprop import ops


def kept_by_topk(rows, k):
    """0/1 mask, by the operator that the mask uses."""
    k = min(k, rows.shape[1])
    return torch.zeros_like(rows).scatter_(1, rows.abs().topk(k, dim=1, sorted=False).indices, 1)


SHAPES = {
    "a linear layer": lambda: (F.linear, ops.linear, (300, 700), (500, 700), {}),
    "a convolution": lambda: (F.conv2d, ops.conv2d, (6, 40, 17, 15), (96, 40, 3, 3), {"padding": 1, "stride": 2}),
    "a wide one": lambda: (F.conv2d, ops.conv2d, (4, 300, 8, 8), (300, 300, 3, 3), {"padding": 1}),
    "one of 1x1": lambda: (F.conv2d, ops.conv2d, (5, 96, 20, 20), (200, 96, 1, 1), {}),
    "a transposed one": lambda: (
        F.conv_transpose2d, ops.conv_transpose2d, (4, 48, 9, 9), (48, 32, 3, 3), {"stride": 2, "padding": 1},
    ),
}  # fmt: skip


def of_shape(name, dtype, k, last=False):
    """The two gradients of sizes at which the work is divided, and those of the mask."""
    dense, sparse, x, w, constants = SHAPES[name]()
    torch.manual_seed(0)
    x, w = torch.randn(x, dtype=dtype), torch.randn(w, dtype=dtype)
    if last and x.dim() == 4:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    x, w = x.requires_grad_(), w.requires_grad_()
    y = dense(x, w, **constants)
    grad = torch.randn_like(y)
    rows = grad.reshape(-1, grad.shape[-1]) if dense is F.linear else grad.flatten(1)
    mask = kept_by_topk(rows, k).view(grad.shape)
    found = torch.autograd.grad(sparse(x, w, **constants, k=k, select="element"), (x, w), grad)
    return found, torch.autograd.grad(y, (x, w), grad * mask)
