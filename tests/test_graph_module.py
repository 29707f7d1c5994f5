"""What torch's GraphModule offers for looking at a graph works on a transformed one."""

import importlib
import sys

import pytest
import torch
from torch import nn

import fxprop

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Two functions, so that the innermost line of a layer differs from the outermost."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.pooled(x))

    def pooled(self, x):
        return self.inner(x).mean((2, 3))  # the line that print_readable shows


def transformed(keep=0.25, **settings):
    policy = fxprop.Policy(keep=keep, when="always", **settings)
    return fxprop.transform(Net(), policy, (X,)).module


def test_print_readable_names_the_users_lines():
    text = transformed().print_readable(print_output=False)
    assert "fxprop_ops_conv2d(" in text
    assert "in pooled, code: return self.inner(x).mean((2, 3))" in text
    assert "torch/fx" not in text


def test_print_tabular(capsys):
    gm = transformed(regions=False)
    gm.graph.print_tabular()
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert "call_function" in rows["conv"]
    assert "'k': 4" in rows["conv"]
    assert "conv2d" in rows["inner"]
    assert "call_module" in rows["head"]


@pytest.mark.filterwarnings("ignore:Was not able to save the following children")
@pytest.mark.parametrize("settings", [{}, {"regions": False}, {"select": "element"}, {"keep": 1.0}])
def test_to_folder_makes_a_package_that_computes_the_same(tmp_path, monkeypatch, settings):
    gm = transformed(**settings)
    gm.to_folder(tmp_path / "written")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "written", raising=False)
    monkeypatch.delitem(sys.modules, "written.module", raising=False)
    again = importlib.import_module("written").FxModule()
    outputs = [module(X) for module in (gm, again)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(again.get_parameter(name).grad, parameter.grad, msg=name)
