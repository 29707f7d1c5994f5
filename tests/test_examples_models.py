"""Part of the mini-batch through models of transformers and torchvision, and in two processes."""

import copy

import pytest
import torch
import torchvision
from kept_rows import assert_same, choice_of, differ, masked, recorded
from torch import nn

import fxprop

transformers = pytest.importorskip("transformers")
N = 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IDS = torch.randint(0, 50, (N, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([[7], [5], [7], [3]])).long()
PIXELS = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def bert(head="ForSequenceClassification"):
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **SMALL)
    return getattr(transformers, f"Bert{head}")(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


# what builds it, its inputs, and the module whose output enters the loss
MODELS = {
    "bert": (bert, {"input_ids": IDS, "attention_mask": MASK}, None),
    "bert with loss": (bert, {"input_ids": IDS, "labels": torch.tensor([0, 1, 1, 0])}, "classifier"),
    "bert, masked words": (lambda: bert("ForMaskedLM"), {"input_ids": IDS, "labels": IDS}, "cls"),
    "gpt2": (gpt2, {"input_ids": IDS}, None),
    "gpt2 with loss": (gpt2, {"input_ids": IDS, "labels": IDS}, "lm_head"),
    "vit": (vit, {"pixel_values": PIXELS}, None),
    "vit with loss": (vit, {"pixel_values": PIXELS, "labels": torch.tensor([0, 1, 2, 0])}, "classifier"),
    "t5 with loss": (t5, {"input_ids": IDS, "labels": IDS}, "lm_head"),
}


def trained(model, inputs, chosen=None, entering=None):
    """Gradients by name; the gradient of the logits, or of what enters the loss, is masked by hand."""
    model.zero_grad()
    torch.manual_seed(1)
    handles = []
    if chosen is not None:
        module = model if entering is None else model.get_submodule(entering)
        handles.append(module.register_forward_hook(lambda *given: marked(given[-1], chosen)))
    output = model(**inputs)
    loss = output.loss if "labels" in inputs else (output.logits * weights_like(output.logits)).sum()
    loss.backward()
    for handle in handles:
        handle.remove()
    return {name: p.grad for name, p in model.named_parameters()}


def weights_like(tensor):
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(2))


def marked(output, chosen):
    logits = output if isinstance(output, torch.Tensor) else output.logits
    marked = logits * 1
    marked.register_hook(lambda grad: masked(grad, *chosen))
    if isinstance(output, torch.Tensor):
        return marked
    output["logits"] = marked
    return output


IN_SHORT = ("bert with loss", "gpt2 with loss", "vit")


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_transformers(name):
    build, inputs, entering = MODELS[name]
    model = build().double().train()
    gm, report = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), example_kwargs=inputs)
    assert not report.examples.off
    with recorded(choice_of(gm)) as taken:
        ours = trained(gm, inputs)
    (one,) = taken
    assert_same(ours, trained(model, inputs, one[1:], entering), 1e-9)
    assert differ(ours, trained(model, inputs))


class BatchNormOfKept(torch.autograd.Function):
    """Batch norm whose backward takes the statistics of all examples for those of the kept ones."""

    kept = None

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        hat = (x - mean) * (var + eps).rsqrt()
        ctx.save_for_backward(hat, weight, (var + eps).rsqrt())
        return hat * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    def backward(ctx, grad):
        hat, weight, scale = ctx.saved_tensors
        kept = BatchNormOfKept.kept
        hat, g = hat[kept], grad[kept]
        dims = (0, 2, 3)
        sums, products = g.sum(dims), (g * hat).sum(dims)
        count = g.numel() // g.shape[1]
        each = (g - sums[:, None, None] / count - hat * products[:, None, None] / count) * scale
        grad_input = torch.zeros_like(grad)
        grad_input[kept] = each * weight[:, None, None]
        return grad_input, products, sums, None


class OracleNorm(nn.BatchNorm2d):
    def forward(self, x):
        return BatchNormOfKept.apply(x, self.weight, self.bias, self.eps)


def with_oracle_norms(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = OracleNorm
    return model


def test_batch_norm_of_resnet18():
    model = torchvision.models.resnet18(num_classes=5).double().train()
    x, grad = torch.randn(N, 3, 32, 32).double(), torch.randn(N, 5).double()
    gm, _ = fxprop.transform(copy.deepcopy(model), fxprop.Policy(examples=0.5), (x,))
    oracle = with_oracle_norms(model)
    with recorded(choice_of(gm)) as taken:
        output = gm(x)
        output.backward(grad)
    chosen = taken[0][1:]
    BatchNormOfKept.kept = chosen[0]
    expected = oracle(x)
    expected.backward(masked(grad, *chosen))
    torch.testing.assert_close(output, expected)
    ours = {name: p.grad for name, p in gm.named_parameters()}
    assert_same(ours, {name: p.grad for name, p in oracle.named_parameters()}, 1e-9)
    # the running statistics are those of all examples
    model(x)
    assert all(torch.equal(b, dict(model.named_buffers())[name]) for name, b in gm.named_buffers())
    # sums over all examples, as the dense backward has them, would be seen
    BatchNormOfKept.kept = torch.arange(N)
    oracle.zero_grad()
    oracle(x).backward(masked(grad, *chosen))
    assert differ(ours, {name: p.grad for name, p in oracle.named_parameters()})


@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny", "efficientnet_b0", "densenet121"])
@pytest.mark.slow
def test_torchvision(name):
    model = torchvision.models.get_model(name, num_classes=5).train()
    x = torch.randn(N, 3, 64, 64)
    gm, report = fxprop.transform(model, fxprop.Policy(examples=0.5), (x,))
    assert not report.examples.off
    gm(x).sum().backward()
    assert fxprop.kept_examples(gm) == (2, 4)


def test_norms_over_processes_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Flatten(), nn.Linear(144, 3))
    _, report = fxprop.transform(model, fxprop.Policy(examples=0.5), (torch.randn(N, 3, 8, 8),))
    assert "SyncBatchNorm '1' joins the examples of several processes" in report.examples.off


def test_detection_is_refused():
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    box = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}
    gm, report = fxprop.transform(model, fxprop.Policy(examples=0.5), (images, [target, target]))
    assert report.examples.off
    losses = gm(images, [target, target])
    sum(losses.values()).backward()
    assert fxprop.kept_examples(gm) is None
