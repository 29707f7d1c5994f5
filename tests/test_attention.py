"""nn.MultiheadAttention and the layers built on it: the same forward, and each projection a site."""

import pytest
import torch
from coverage_oracle import gradients_equal
from torch import nn

import fxprop

E, HEADS = 16, 4
KEEP = fxprop.Policy(rules=[fxprop.Rule(name="*", keep=0.5)])


class Attention(nn.Module):
    """Calls its attention as self-attention, on a memory, or with three different tensors."""

    def __init__(self, pattern, call=None, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, **options)
        self.pattern, self.call = pattern, call or {}

    def forward(self, x, memory, value):
        inputs = {"self": (x, x, x), "memory": (x, memory, memory), "all": (x, memory, value)}
        output, weights = self.attn(*inputs[self.pattern], **self.call)
        return output if weights is None else (output, weights)


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, tuple):
            assert_equal(one, other)
        else:
            assert torch.equal(one, other)


def tensors(options, batched=True, dtype=torch.float32):
    torch.manual_seed(0)
    first = options.get("batch_first", False)

    def make(length, features):
        if not batched:
            return torch.randn(length, features, dtype=dtype)
        return torch.randn(*((3, length) if first else (length, 3)), features, dtype=dtype)

    return make(5, E), make(7, options.get("kdim") or E), make(7, options.get("vdim") or E)


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"kdim": 6, "vdim": 10},
    {"dropout": 0.3},
]


@pytest.mark.parametrize("frontend", ["symbolic", "submodules"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", ["self", "memory", "all"])
def test_every_option_of_the_module(frontend, options, pattern):
    if "kdim" in options and pattern != "all":
        pytest.skip("different kdim and vdim need different key and value")
    inputs = tensors(options)
    model = Attention(pattern, **options)
    for training in (True, False):
        gm, report = fxprop.transform(model.train(training), KEEP, inputs, frontend=frontend)
        assert all(layer.status == "rewritten" for layer in report.layers)
        torch.manual_seed(1)
        expected = model(*inputs)
        torch.manual_seed(1)
        assert_equal(gm(*inputs), expected)


def key_padding_mask():
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 5:] = True
    return mask


CALLS = [
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": torch.randn(5, 7)},
    {"attn_mask": torch.randn(5, 7) > 1, "need_weights": False},
    {"attn_mask": torch.randn(3 * HEADS, 5, 7)},
    {"key_padding_mask": key_padding_mask()},
    {"key_padding_mask": key_padding_mask(), "attn_mask": torch.rand(5, 7) > 0.9, "need_weights": False},
    {"attn_mask": torch.ones(5, 7).triu(1).bool(), "is_causal": True, "need_weights": False},
]


@pytest.mark.parametrize("frontend", ["symbolic", "submodules"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: ",".join(call))
def test_every_way_to_call_it(frontend, call):
    inputs = tensors({})
    model = Attention("memory", call)
    gm, _ = fxprop.transform(model, KEEP, inputs, frontend=frontend)
    ours, theirs = gm(*inputs), model(*inputs)
    assert_equal((ours,), (theirs,))


@pytest.mark.parametrize("frontend", ["auto", "submodules"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched(frontend, need_weights):
    inputs = tensors({}, batched=False)
    model = Attention("memory", {"need_weights": need_weights})
    gm, _ = fxprop.transform(model, KEEP, inputs, frontend=frontend)
    assert_equal((gm(*inputs),), (model(*inputs),))


@pytest.mark.parametrize(
    ("pattern", "options", "names"),
    [
        ("self", {}, ["attn.in_proj", "attn.out_proj"]),
        ("memory", {}, ["attn.in_proj", "attn.in_proj#2", "attn.out_proj"]),
        ("all", {}, ["attn.in_proj", "attn.in_proj#2", "attn.in_proj#3", "attn.out_proj"]),
        ("all", {"kdim": 6, "vdim": 10}, ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"]),
    ],
)
@pytest.mark.parametrize("frontend", ["symbolic", "submodules"])
def test_names_and_gradients(pattern, options, names, frontend):
    inputs = tensors(options)
    model = Attention(pattern, {"need_weights": False}, **options)
    sites = fxprop.layers(model, inputs, frontend=frontend)
    assert [site.name for site in sites] == names
    assert [site.is_output for site in sites] == [name == "attn.out_proj" for name in names]
    assert gradients_equal(model, 0.5, inputs, {}) == "equal"


def test_the_oracle_can_fail():
    inputs = tensors({})
    model = Attention("self")
    wrong = fxprop.Policy(keep=0.5, rules=[fxprop.Rule(name="attn.in_proj", keep=0.25)])
    assert gradients_equal(model, wrong, inputs, {}, keep=0.5).startswith("DIFFER")


def test_another_pattern_of_calls_is_refused_where_it_would_be_wrong():
    model = nn.Sequential(nn.MultiheadAttention(E, HEADS))

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.same = model[0], True

        def forward(self, x):
            if x.sum().isnan():
                return x
            return self.attn(x, x, x if self.same else x + 1)[0]

    x = torch.randn(5, 3, E)
    gm, _ = fxprop.transform(Calls(), KEEP, (x,))
    gm(x)
    gm.same = False
    with pytest.raises(fxprop.FxpropError, match="different key and value, but the graph was made for"):
        gm(x)


LAYERS = {
    "encoder": lambda **o: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 24, **o), 2),
    "decoder": lambda **o: nn.TransformerDecoder(nn.TransformerDecoderLayer(E, HEADS, 24, **o), 2),
    "both": lambda **o: nn.Transformer(E, HEADS, 1, 1, 24, **o),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "norm_first": True}, {"activation": "gelu"}])
def test_transformer_layers(name, options):
    torch.manual_seed(0)
    model = LAYERS[name](dropout=0.1, **options)
    x = torch.randn(4, 3, E)
    inputs = (x,) if name == "encoder" else (x, torch.randn(4, 3, E))
    gm, report = fxprop.transform(model, 0.5, inputs)
    assert {layer.status for layer in report.layers} == {"rewritten", "dense"}
    assert [layer.name for layer in report.layers if layer.status == "dense"] == [report.layers[-1].name]
    assert list(gm.state_dict()) == list(model.state_dict())
    for training in (True, False):
        outputs = []
        for module in (model.train(training), gm.train(training)):
            torch.manual_seed(1)
            outputs.append(module(*inputs))
        assert torch.equal(*outputs)
    with torch.no_grad():  # where torch takes a fused kernel for the dense model
        torch.testing.assert_close(gm(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert gradients_equal(LAYERS[name](dropout=0.0, **options), 0.5, inputs, {}) == "equal"


def test_vit_rewrites_every_linear_but_the_head():
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    report = fxprop.estimate(model, 0.05, (torch.empty(8, 3, 224, 224, device="meta"),))
    dense = [layer.name for layer in report.layers if layer.status != "rewritten"]
    assert dense == ["heads.head"]
    assert len(report.layers) == 1 + 12 * 4 + 1
    in_proj = next(layer for layer in report.layers if layer.name.endswith("in_proj"))
    assert (in_proj.weight_shape, in_proj.n, in_proj.k) == ((2304, 768), 2304, 115)


@pytest.mark.parametrize("pattern", ["self", "memory", "all"])
def test_without_a_batch_each_of_three_equal_tensors_is_projected_alone(pattern):
    """As torch does: packed into one product, the last bit of the result may differ."""
    for length in range(1, 9):
        torch.manual_seed(length)
        model = Attention(pattern)
        inputs = torch.randn(length, E), torch.randn(length + 2, E), torch.randn(length + 2, E)
        gm, report = fxprop.transform(model, KEEP, inputs)
        assert_equal([gm(*inputs)], [model(*inputs)])
        assert all(layer.status == "rewritten" for layer in report.layers)
