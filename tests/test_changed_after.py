"""What is changed on a module after the rewrite has the effect that it has on any module; modes switch all of it."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from compare import assert_behaves_like, assert_equal, outcome, saved_tensors, state_of, warned
from models import MAY_RUN_AS_WRITTEN, POLICY, Net, X, transform
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import fxprop

pytestmark = MAY_RUN_AS_WRITTEN
THIS = sys.modules[__name__]


def activation(x):
    return torch.relu(x)


SCALE = 1.0
TABLE = {"scale": 1.0}


class Config:
    scale = 1.0

    def __init__(self):
        self.shift = 0.0


class Rich(Net):
    """Its forward reads all that these tests change."""

    temperature = 1.0

    def __init__(self):
        super().__init__()
        self.act, self.drop, self.norm = nn.ReLU(), nn.Dropout(0.0), nn.LayerNorm(12)
        self.blocks = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
        self.head = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
        self.t, self.p, self.steps, self.use_b = 1.0, 0.0, 1, True
        self.function, self.config, self.options = torch.tanh, Config(), {"scale": 1.0, "parts": [1.0, 2.0]}

    def block(self, x):
        return self.act(self.b(x))

    def forward(self, x):
        h = self.norm(activation(self.a(x)))
        for _ in range(self.steps):
            h = self.block(h) if self.use_b else h
        for block in self.blocks:
            h = h + self.function(block(h))
        h = F.dropout(self.drop(h), self.p, self.training) * self.t / self.temperature
        scale = SCALE * TABLE["scale"] * self.options["scale"] * sum(self.options["parts"]) * Config.scale
        return self.head(h) * scale + self.config.shift


class Adapter(nn.Module):
    """As LoRA libraries put them around a layer."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(3)
        self.base, self.down, self.up = base, nn.Linear(12, 2), nn.Linear(2, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def new_linear(*sizes):
    torch.manual_seed(3)
    return nn.Linear(*sizes)


def swaps_forward(net):
    net.b.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight), net.b)


def swaps_own_forward(net):
    net.forward = types.MethodType(lambda self, x: 2 * type(self).body(self, x), net)


# each is done to the rewritten module and to an untouched one
CHANGES = {
    "a layer becomes an adapter": lambda net: setattr(net, "b", Adapter(net.b)),
    "a nested layer becomes an adapter": lambda net: net.blocks.__setitem__(1, Adapter(net.blocks[1])),
    "a layer in a Sequential becomes an adapter": lambda net: net.head.__setitem__(0, Adapter(net.head[0])),
    "a layer becomes two": lambda net: setattr(
        net, "b", nn.Sequential(net.b, nn.Tanh(), new_linear(12, 12))
    ),
    "a layer is taken out": lambda net: setattr(net, "b", nn.Identity()),
    "a head with other outputs": lambda net: net.head.__setitem__(2, new_linear(12, 7)),
    "a layer is replaced with its like": lambda net: setattr(net, "b", new_linear(12, 12)),
    "an activation module is replaced": lambda net: setattr(net, "act", nn.Tanh()),
    "an activation in a Sequential is replaced": lambda net: net.head.__setitem__(1, nn.Sigmoid()),
    "a layer is appended": lambda net: net.blocks.append(new_linear(12, 12)),
    "a layer is deleted": lambda net: net.blocks.__delitem__(0),
    "the list of layers is shortened": lambda net: setattr(net, "blocks", net.blocks[:1]),
    "a Sequential grows": lambda net: net.head.append(new_linear(4, 3)),
    "a parameter is replaced": lambda net: setattr(
        net.b, "weight", nn.Parameter(net.b.weight.detach() * 2)
    ),
    "weights are tied": lambda net: setattr(net.b, "weight", net.blocks[0].weight),
    "a bias is removed": lambda net: setattr(net.b, "bias", None),
    "a layer is frozen": lambda net: net.b.requires_grad_(False),
    "a number is annealed": lambda net: setattr(net, "t", 0.1),
    "a probability of dropout is raised": lambda net: setattr(net, "p", 0.5),
    "a Dropout's probability is raised": lambda net: setattr(net.drop, "p", 0.5),
    "a norm's eps is raised": lambda net: setattr(net.norm, "eps", 0.5),
    "more steps": lambda net: setattr(net, "steps", 3),
    "a flag is lowered": lambda net: setattr(net, "use_b", False),
    "a function held as an attribute is swapped": lambda net: setattr(net, "function", torch.sigmoid),
    "an attribute of an object": lambda net: setattr(net.config, "shift", 2.0),
    "an object is replaced": lambda net: setattr(net, "config", types.SimpleNamespace(shift=3.0)),
    "an entry of a dict": lambda net: net.options.update(scale=0.3),
    "an item of a list in a dict": lambda net: net.options["parts"].__setitem__(0, 5.0),
    "an attribute shadows that of the class": lambda net: setattr(net, "temperature", 2.0),
    "a method is shadowed": lambda net: setattr(net, "block", torch.sigmoid),
    "the forward of a layer is replaced": swaps_forward,
    "its own forward is replaced": swaps_own_forward,
}


@pytest.fixture(params=["traced whole", "in parts"])
def pair(request):
    """A rewritten module, and an untouched one."""
    torch.manual_seed(0)
    model = Rich()
    untouched = copy.deepcopy(model)
    frontend = "auto" if request.param == "traced whole" else "submodules"
    return transform(model, frontend=frontend)[0], untouched


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_has_the_effect_it_has_on_any_module(pair, change):
    for module in pair:
        module(X).sum().backward()  # it was in use before
        CHANGES[change](module)
    assert_behaves_like(*pair, modes=(True, False))


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        ("THIS", "SCALE", 3.0),
        ("THIS", "activation", torch.sigmoid),
        ("TABLE", "scale", 3.0),
        ("Rich", "temperature", 3.0),
        ("Config", "scale", 3.0),
        ("Rich", "block", lambda self, x: self.b(x) * 2),
    ],
)
def test_so_has_a_change_of_a_global_or_of_a_class(pair, monkeypatch, owner, name, value):
    module, untouched = pair
    module(X)
    if owner == "TABLE":
        monkeypatch.setitem(TABLE, name, value)
    else:
        monkeypatch.setattr(globals()[owner], name, value)
    assert_behaves_like(module, untouched, modes=(True, False), steps=1)


def test_a_change_is_undone(pair):
    for value in (0.1, 1.0, 0.5):
        for module in pair:
            module.t = value
        assert_behaves_like(*pair, modes=(True,), steps=1)


@pytest.mark.parametrize("how", ["copy", "restored"])
def test_a_change_after_copying_or_restoring(pair, how):
    module, untouched = pair
    module = copy.deepcopy(module) if how == "copy" else fxprop.restore(module)
    for net in (module, untouched):
        net.t, net.b = 0.1, Adapter(net.b)
    assert_behaves_like(module, untouched, modes=(True, False), steps=1)


@pytest.mark.parametrize("layer", ["b", "blocks.1", "head.0"])
def test_an_adapter_is_trained(pair, layer):
    module, _ = pair
    module.set_submodule(layer, Adapter(module.get_submodule(layer)))
    module(X).sum().backward()
    adapter = module.get_submodule(layer)
    assert all(p.grad is not None and p.grad.any() for p in adapter.down.parameters())
    assert all(p.grad is not None and p.grad.any() for p in adapter.up.parameters())


@pytest.mark.parametrize(("name", "value"), [("stride", (2, 2)), ("padding", (1, 1)), ("dilation", (2, 2))])
def test_settings_of_a_conv_are_changed(name, value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    untouched, x = copy.deepcopy(model), torch.randn(2, 3, 12, 12)
    gm, _ = transform(model, x)
    for net in (gm, untouched):
        setattr(net[3], name, value)
        net[1].momentum, net[1].eps = 0.5, 0.1
    assert_behaves_like(gm, untouched, (x,))


# --- train() and eval()


class Flagged(Net):
    def train(self, mode=True):
        super().train(mode)
        self.auxiliary = mode
        return self

    def forward(self, x):
        return self.body(x) + (10 if self.auxiliary else 0)


class OwnEval(Net):
    offset = 0.0

    def eval(self):
        self.offset = 2.0
        return super().eval()

    def forward(self, x):
        return self.body(x) + self.offset


class Merges(Net):
    """Adds a product to a weight in eval mode, and takes it away in training, as loralib does."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.randn(12, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.b.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x):
        h = torch.relu(self.a(x))
        more = 0 if self.merged else h @ (self.up @ self.down).T
        return self.o(torch.relu(self.b(h) + more))


class Fuses(Net):
    """Makes a layer of two in eval mode, as RepVGG does."""

    def train(self, mode=True):
        super().train(mode)
        self.fused = None
        if not mode:
            self.fused = nn.Linear(6, 12).eval()
            self.fused.weight.data = self.b.weight.data @ self.a.weight.data
            self.fused.bias.data = self.b.weight.data @ self.a.bias.data + self.b.bias.data
        return self

    def forward(self, x):
        h = self.b(self.a(x)) if self.fused is None else self.fused(x)
        return self.o(torch.relu(h))


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        h = F.dropout(torch.relu(self.a(x)), 0.5, self.training)
        return self.o(h)


class Hosts(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.o = create_feature_extractor(Drops(), ["relu", "o"]), nn.Linear(6, 4)

    def forward(self, x):
        return self.o(self.features(x)["o"])


MODES = {
    "train() sets a flag": Flagged,
    "a child's train() sets a flag": lambda: nn.Sequential(nn.Linear(6, 6), Flagged(), nn.Linear(4, 4)),
    "eval() sets an attribute": OwnEval,
    "train() merges weights": Merges,
    "a child's train() merges weights": lambda: nn.Sequential(nn.Linear(6, 6), Merges(), nn.Linear(4, 4)),
    "train() makes a layer": Fuses,
    "a feature extractor": lambda: create_feature_extractor(Drops(), ["o"]),
    "a feature extractor inside": Hosts,
}


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", MODES)
def test_both_modes_are_the_models(name, start):
    torch.manual_seed(0)
    model = MODES[name]().train(start)
    untouched, before = copy.deepcopy(model), state_of(model)
    gm, _ = transform(model)
    assert_equal(state_of(model), before, "the model")
    for module in (gm, copy.deepcopy(gm)):
        twin = copy.deepcopy(untouched)
        assert_behaves_like(module, twin, modes=(start, not start, start, not start), steps=1)
        module.eval(), twin.eval()
        assert torch.equal(*(y if torch.is_tensor(y) else y["o"] for y in (module(X), twin(X))))


@pytest.mark.parametrize("part", ["0", "1.0", "1"])
def test_a_part_put_in_another_mode_than_the_rest_follows_or_says_so(part):
    for mode in (True, False):
        model = nn.Sequential(Drops(), nn.Sequential(Drops(), nn.Linear(6, 6)), nn.Linear(6, 4)).train(mode)
        untouched = copy.deepcopy(model)
        gm, _ = transform(model)
        with warned() as given:
            for module in (gm, untouched):
                module.get_submodule(part).train(not mode)
            ours, theirs = outcome(gm), outcome(untouched)
        if not any("mode" in str(warning.message) for warning in given):
            assert_equal(ours, theirs, f"{part} in another mode than training = {mode}")


# --- libraries


def llama():
    transformers = pytest.importorskip("transformers", reason="makes the small Llama")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32}
    config = transformers.LlamaConfig(intermediate_size=64, vocab_size=64, **sizes)
    ids = torch.arange(16).view(2, 8)
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def test_peft_after_the_rewrite():
    peft = pytest.importorskip("peft", reason="its adapters are put on the rewritten model")
    model, kwargs = llama()
    untouched = copy.deepcopy(model)
    gm, _ = fxprop.transform(model, POLICY, example_kwargs=kwargs)
    losses = []
    for module in (gm, untouched):
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(module, config)
        losses.append(adapted(**kwargs).loss)
        losses[-1].backward()
        adapters = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
        assert len(adapters) == 4
        assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []
    assert torch.equal(*losses)


def test_checkpointing_of_transformers_switched_on_afterwards():
    model, kwargs = llama()
    untouched = copy.deepcopy(model)
    gm, _ = fxprop.transform(model.train(), POLICY, example_kwargs=kwargs)
    before = saved_tensors(lambda: gm(**kwargs))
    for module in (gm, untouched.train()):
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert saved_tensors(lambda: gm(**kwargs)) < before
    assert torch.equal(gm(**kwargs).loss, untouched(**kwargs).loss)
    gm(**kwargs).loss.backward()
    assert all(p.grad is not None for p in gm.parameters())


@pytest.mark.filterwarnings("ignore:.*checkpoint.*use_reentrant:UserWarning")
def test_checkpointing_of_timm_switched_on_afterwards():
    timm = pytest.importorskip("timm", reason="makes the small ViT")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    model, x = timm.models.VisionTransformer(**sizes), torch.randn(2, 3, 16, 16)
    untouched = copy.deepcopy(model)
    gm, _ = transform(model, x)
    before = saved_tensors(lambda: gm(x))
    for module in (gm, untouched):
        module.set_grad_checkpointing(True)
    assert saved_tensors(lambda: gm(x)) < before
    assert torch.equal(gm(x), untouched(x))
    gm(x).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())
