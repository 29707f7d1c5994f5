"""Autocast, half types, values that are not finite, and memory formats."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxprop

HALF = [torch.bfloat16, torch.float16]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.GELU(),
        nn.Linear(64, 5),
    )


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_gives_the_forward_and_the_dtypes_of_the_dense_model(dtype, select):
    model = net()
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=0.2, select=select), (X,))
    outputs, gradients = [], []
    for module in (copy.deepcopy(model), gm):
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            output = module(x)
        outputs.append(output)
        output.float().square().sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()} | {"x": x.grad})
    assert outputs[0].dtype == outputs[1].dtype == dtype
    assert torch.equal(*outputs)
    dense, sparse = gradients
    assert {n: g.dtype for n, g in sparse.items()} == {n: g.dtype for n, g in dense.items()}
    assert sparse["0.weight"].dtype == torch.float32
    assert sparse["3.weight"].flatten(1).abs().sum(1).count_nonzero() < 32 or select == "element"


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_keep_one_is_dense(dtype):
    model = net()
    gm, _ = fxprop.transform(model, 1.0, (X,))
    gradients = []
    for module in (copy.deepcopy(model), gm):
        with torch.autocast("cpu", dtype):
            output = module(X)
        output.float().square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", HALF)
def test_pure_half_models(dtype):
    model = net().to(dtype)
    gm, _ = fxprop.transform(model, 0.2, (X.to(dtype),))
    output = gm(X.to(dtype))
    assert torch.equal(output, model(X.to(dtype)))
    output.sum().backward()
    assert {p.grad.dtype for p in gm.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("score", ["l1", "l2"])
def test_scores_of_half_types_are_summed_in_float32(dtype, score):
    # 0.001 a million times is lost in a half sum; a second channel is larger in one entry alone
    grad = torch.full((1024, 2), 1e-3, dtype=dtype)
    grad[:, 1] = 0
    grad[0, 1] = 0.5
    weight = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    y = fxprop.ops.linear(torch.ones(1024, 3, dtype=dtype), weight, k=1, score=score)
    y.backward(grad)
    kept = weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert kept == ([0] if score == "l1" else [1])


def test_grad_scaler_skips_the_step_and_backs_off():
    model = net()
    gm, _ = fxprop.transform(model, 0.2, (X,))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    before = {name: p.clone() for name, p in gm.named_parameters()}
    for poison, moves in ((float("inf"), False), (0.0, True)):
        optimizer.zero_grad()
        # as an overflow in the middle of the network does: one entry of one gradient
        handle = _poison_gradient_of(gm, poison) if poison else None
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(gm(X), torch.arange(8) % 5)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if handle is not None:
            handle.remove()
        moved = any(not torch.equal(p, before[name]) for name, p in gm.named_parameters())
        assert moved == moves
        assert (scaler.get_scale() < scale) == (not moves)


def _poison_gradient_of(gm, value):
    def poison(module, grad_input, grad_output):
        (grad,) = grad_input
        grad = grad.clone()
        grad.view(-1)[0] = value
        return (grad,)

    return gm[8].register_full_backward_hook(poison)


def test_float32_matmul_precision_is_left_to_the_kernels():
    assert torch.get_float32_matmul_precision() == "highest"
    model = net()
    gm, _ = fxprop.transform(model, 0.2, (X,))
    gm(X).sum().backward()
    assert torch.get_float32_matmul_precision() == "highest"


class LargeCopies(TorchDispatchMode):
    """The operators that write a tensor as large as the output gradient."""

    COPIES = ("clone", "copy_", "contiguous", "_to_copy", "new_empty_strided")

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in self.COPIES and isinstance(result, torch.Tensor) and result.numel() >= self.numel:
            self.found.append(name)
        return result


# 16 channels of 3 x 3 go to the convolution's kernel; a single one is copied 9 times, which is not large
@pytest.mark.parametrize(("kernel", "k"), [(1, 6), (3, 16), (3, 1)])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_stays_and_nothing_large_is_copied(kernel, k, format):
    x = torch.randn(4, 16, 12, 12).contiguous(memory_format=format).requires_grad_()
    weight = torch.randn(64, 16, kernel, kernel).contiguous(memory_format=format).requires_grad_()
    y = fxprop.ops.conv2d(x, weight, padding=kernel // 2, k=k)
    assert y.is_contiguous(memory_format=format)
    grad = torch.randn_like(y)
    with LargeCopies(x.numel()) as copies:
        y.backward(grad)
    assert copies.found == []
    assert x.grad.is_contiguous(memory_format=format)
    assert weight.grad.stride() == weight.stride()


def test_the_watch_for_copies_can_fail():
    x = torch.randn(4, 16, 12, 12)
    with LargeCopies(x.numel()) as copies:
        x.contiguous(memory_format=torch.channels_last)
    assert copies.found


def test_channels_last_model_gives_the_gradients_of_the_contiguous_one():
    model = net().double()
    gm, _ = fxprop.transform(model, 0.2, (X.double(),))
    last = copy.deepcopy(gm).to(memory_format=torch.channels_last)
    gm(X.double()).square().sum().backward()
    output = last(X.double().contiguous(memory_format=torch.channels_last))
    output.square().sum().backward()
    for (name, ours), theirs in zip(last.named_parameters(), gm.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12), name
