"""What the report says of a model whose layers are called in other ways than by its forward, or are compiled."""

import torch
import torch.nn.functional as F
from models import Net, X, transform
from torch import nn

import fxprop


class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def encode(self, x):
        return torch.relu(self.a(x))

    def body(self, x):
        return self.o(torch.relu(self.b(self.encode(x))))

    def training_step(self, x):
        return self.body(x).sum()

    def name_of(self, x):
        return str(x)

    def forward(self, x):
        return self.o(torch.relu(F.linear(self.encode(x), self.b.weight)))


def test_methods_that_call_layers_without_forward_are_named_with_the_share_that_is_sparse_there():
    note = fxprop.estimate(Trainer(), fxprop.Policy(keep=0.3, when="always"), (X,)).note
    # a, 6 x 12, is a module of its own; b is multiplied by as a matrix, 12 x 12
    assert "Where body(), training_step() call layers directly, 1 of the 2 rewritten layers (33% of" in note
    assert "encode" not in note  # forward calls it
    assert "name_of" not in note  # calls no layer
    assert "calls of forward" not in transform(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))[1].note


def test_what_was_compiled_is_named():
    model = Net()
    model.b.compile(backend="eager")
    gm, report = transform(model)
    assert "These were compiled and in the result are not: b." in report.note
    assert [layer.name for layer in report.layers] == ["a", "b", "o"]
    assert torch.equal(gm(X), model(X))


def test_a_report_without_example_inputs_says_what_it_lacks():
    note = fxprop.transform(nn.Sequential(nn.Linear(6, 4)), fxprop.Policy(k=2))[1].note
    assert "the graph was not compared with what the model does" in note
