"""torch.compile of transformed modules: whole graphs, equal gradients, any batch size, no host in between."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from operators import OPERATORS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.vision_transformer import VisionTransformer

import fxprop


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        heads = (batch, length, 4, width // 4)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """The shape of GPT-2, with its output layer tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.positions = nn.Parameter(torch.randn(16, 32) * 0.02)
        self.blocks = nn.ModuleList([Block(32), Block(32)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def vit():
    model = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision's zeros would make every gradient zero
    return model


def images(batch):
    return torch.randn(batch, 3, 32, 32)


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), lambda b: torch.randn(b, 3, 64, 64)),
    "vit": (vit, images),
    "gpt": (GPT, lambda batch: torch.randint(0, 50, (batch, 16))),
}


def case(name, dtype=torch.float32, select="channel", keep=0.1):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, x = build().to(dtype), inputs(8)
    x = x.to(dtype) if x.is_floating_point() else x
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=keep, select=select), (x,))
    return gm, x


def gradients(module, x):
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(module(x).square().mean(), parameters)


def difference(ours, theirs):
    """The largest relative difference of any parameter's gradient."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


def check(name, select, dtype, backend):
    torch._dynamo.reset()
    gm, x = case(name, dtype, select)
    expected = gradients(gm, x)
    compiled = torch.compile(copy.deepcopy(gm), fullgraph=True, backend=backend)
    bound = {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    assert difference(gradients(compiled, x), expected) < bound


@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_gradients_are_the_eager_ones(name, select):
    check(name, select, torch.float64, "aot_eager")


def test_compiled_by_inductor():
    check("gpt", "channel", torch.float32, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_gradients_by_inductor(name, select, dtype):
    if dtype == torch.float64 and name != "resnet18" and torch.__version__ < "2.12":
        pytest.skip("inductor of torch 2.11 cannot compile attention in float64, of dense models either")
    check(name, select, dtype, "inductor")


@pytest.mark.parametrize("select", ["channel", "element", "row"])
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_code_behind_an_operator_is_compiled_under_the_same_autocast(operator, select):
    """A backward that is traced twice would leave it off: see `fxprop.ops.kernels.layout`."""
    sample = operator.samples[0]
    leaves = sample.leaves(torch.bfloat16 if operator.name == "grouped_mm" else torch.float32)
    dtype = leaves["weight"].dtype
    if select == "row" and operator.name.startswith(("conv_batch_norm", "linear_activation", "grouped_mm")):
        pytest.skip("it has channels and elements only")

    def call():
        return operator.run(sample, leaves, k=2, select=select), torch.is_autocast_enabled("cpu")

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        output, still_on = torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert still_on
    output.float().square().sum().backward()
    assert leaves["weight"].grad.dtype == dtype


@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_in_a_row_under_autocast(channels_last):
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * 8 * 8, 32), nn.Linear(32, 4))
    x = torch.randn(4, 3, 8, 8)
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=0.25, when="always", regions=False), (x,))
    if channels_last:
        gm, x = gm.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    found = []
    for module in (gm, torch.compile(copy.deepcopy(gm), fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        assert output.dtype == torch.bfloat16
        found.append(torch.autograd.grad(output.float().square().mean(), tuple(module.parameters())))
    assert [grad.dtype for grad in found[1]] == [torch.float32] * len(found[0])
    assert difference(found[1], found[0]) < 0.05


def test_the_difference_can_be_seen():
    gm, x = case("gpt")
    other, _ = case("gpt", keep=0.2)
    assert difference(gradients(gm, x), gradients(other, x)) > 0.1


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "vit", "gpt"])
def test_any_batch_size_without_compiling_again(name):
    gm, _ = case(name)
    counts = []
    for module in (fxprop.restore(gm), gm):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        for batch in (8, 5, 6, 3):
            gradients(compiled, MODELS[name][1](batch))
        counts.append(counter.frame_count)
    assert counts == [1, 1]


@pytest.mark.parametrize("size", [9, 12])
def test_few_channels_of_free_sizes(size):
    """What decides between kernels is a number for torch.compile, on small images as on others."""
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 2, 3)
    )
    x = torch.randn(4, 3, size, size)
    gm, _ = fxprop.transform(net, fxprop.Policy(keep=0.25, when="always"), (x,))
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 3):
        assert difference(gradients(compiled, x[:batch]), gradients(gm, x[:batch])) < 1e-5


class HostReads(TorchDispatchMode):
    """Operators whose result the host has to wait for: shapes or values that depend on data."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "equal", "is_nonzero")
        if func._schema.name.partition("::")[2] in names:
            self.found.append(func._schema.name)
        indices = args[1] if func is torch.ops.aten.index.Tensor else ()
        if any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append("index by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("name", MODELS)
def test_the_backward_never_waits_for_the_device(name, select):
    gm, x = case(name, select=select)
    loss = gm(x).square().mean()
    with HostReads() as reads:
        loss.backward()
    assert reads.found == []


def test_the_watch_for_host_reads_can_fail():
    with HostReads() as reads:
        x = torch.randn(4)
        x[x > 0].sum().item()
    assert reads.found == ["index by a mask", "aten::_local_scalar_dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs():
    """mode="reduce-overhead" replays the backward as one CUDA graph."""
    torch._dynamo.reset()
    gm, x = case("vit")
    gm, x = gm.cuda(), x.cuda()
    expected = gradients(gm, x)
    compiled = torch.compile(gm, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        found = [grad.clone() for grad in gradients(compiled, x)]
    assert difference(found, expected) < 1e-3


def test_a_transform_leaves_pythons_math_known_to_torch_compile():
    """torch.fx wraps it while it traces; what torch.compile learns of it then would be wrong for ever."""
    code = """
import torch, fxprop
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
x = torch.randn(2, 3, 6, 6)
gm, _ = fxprop.transform(model, fxprop.Policy(k=2, when="always"), (x,))
torch.compile(gm, backend="aot_eager", fullgraph=True)(x).sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
