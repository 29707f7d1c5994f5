"""Every example in the package's docstrings runs, and gives what it says where it says something."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxprop


class MyLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.linear(x, self.kernel, self.shift)


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )


def trained(model, x):
    """What the examples call a model, and what was made of it."""
    gm, report = fxprop.transform(model, fxprop.Policy(keep=0.05, when="always"), (x,))
    loader = [(x, torch.arange(len(x)) % 4)] * 2
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    return {
        "model": model, "x": x, "images": x, "gm": gm, "report": report,
        "loader": loader, "loss": F.cross_entropy, "optimizer": optimizer,
    }  # fmt: skip


def of_operator(x, weight, bias=True):
    shapes = {"x": x, "weight": weight, "w": weight}
    tensors = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    return {**tensors, "bias": torch.randn(weight[0], requires_grad=True) if bias else None}


# what an example finds, by the name of what it is about
READY = {
    **{f"conv{d}d": lambda d=d: of_operator((2, 4, *[5] * d), (8, 4, *[3] * d)) for d in (1, 2, 3)},
    **{
        f"conv_transpose{d}d": lambda d=d: of_operator((2, 8, *[5] * d), (8, 8, *[3] * d))
        for d in (1, 2, 3)
    },
    "conv_batch_norm": lambda: of_operator((2, 4, 5, 5), (64, 4, 3, 3)),
    "conv_group_norm": lambda: of_operator((2, 4, 5, 5), (64, 4, 3, 3)),
    "linear": lambda: of_operator((4, 16), (64, 16)),
    "linear_activation": lambda: of_operator((4, 16), (256, 16)),
    "matmul": lambda: of_operator((64, 64), (64, 64)),
    "addmm": lambda: {**of_operator((4, 16), (16, 64), None), "bias": torch.randn(64)},
    "einsum": lambda: of_operator((2, 3, 16), (16, 8, 8), None),
    "grouped_mm": lambda: {
        **of_operator((12, 16), (3, 16, 64), None),
        "offs": torch.tensor([4, 8, 12], dtype=torch.int32),
    },
    "attention": lambda: {name: torch.randn(5, 2, 24) for name in "qkv"},
    "PythonState": lambda: {"model": Counting(3, 3), "x": torch.randn(2, 3)},
    "SparseProducts": lambda: of_operator((4, 16), (512, 16)),
    "Made": lambda: {"weight": torch.randn(3)},
    "names_to_preserve": lambda: {"resnet18": torchvision.models.resnet18()},
    "transform": lambda: {"images": torch.randn(2, 3, 64, 64)},
    "register_site": lambda: {
        "MyLinear": MyLinear,
        "my_ops": SimpleNamespace(project=lambda x, w: x @ w),
    },
}
RESNET = {
    "FxpropError",
    "code_diff",
    "copy_tree",
    "explain",
    "find_sites",
    "layers",
    "op_counts",
    "restore",
    "Site",
}


class Counting(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def namespace(module, name):
    """What a docstring's examples find: the names of its module, and objects made for it."""
    names = {"torch": torch, "nn": nn, "F": F, "torchvision": torchvision, "fxprop": fxprop, "Path": Path}
    names |= {**vars(module), "schedules": fxprop.schedules}
    last = name.split(".")[-1]
    torch.manual_seed(0)
    if last in READY:
        return {**names, **READY[last]()}
    if last in RESNET:
        model, x = torchvision.models.resnet18(), torch.randn(2, 3, 64, 64)
        gm, report = fxprop.transform(model, 0.05, (x,))
        return {**names, "model": model, "x": x, "gm": gm, "report": report}
    return {**names, **trained(small(), torch.randn(2, 3, 8, 8))}


class Checker(doctest.OutputChecker):
    """An example that shows no output only has to run."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


def examples():
    """(docstring's examples, module, whether it is public) of all of the package."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    public = [(fxprop, f"fxprop.{name}", getattr(fxprop, name)) for name in fxprop.__all__]
    public += [(fxprop.ops, f"fxprop.ops.{name}", getattr(fxprop.ops, name)) for name in fxprop.ops.__all__]
    found = [(test, fxprop, True) for test in finder.find(fxprop, "fxprop") if test.name == "fxprop"]
    for module, name, value in public:
        if not inspect.ismodule(value):
            found += [(test, module, True) for test in finder.find(value, name, module=False, globs={})]
    for info in pkgutil.walk_packages(fxprop.__path__, "fxprop."):
        if info.name not in ("fxprop.__main__", "fxprop.frontends"):
            module = importlib.import_module(info.name)
            of_schedules = module is fxprop.schedules
            found += [(test, module, of_schedules) for test in finder.find(module, module.__name__)]
    seen = {}
    for test, module, is_public in found:
        if test.examples:
            seen.setdefault(test.docstring, (test, module, is_public))
    return list(seen.values())


EXAMPLES = examples()


@pytest.fixture
def in_a_directory(tmp_path, monkeypatch):
    """With the files that examples name."""
    monkeypatch.chdir(tmp_path)
    Path("policy.toml").write_text("keep = 0.05\n")
    exported = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    torch.export.save(exported, "model.pt2")


@pytest.mark.usefixtures("in_a_directory")
@pytest.mark.parametrize(("test", "module", "public"), EXAMPLES, ids=[test.name for test, _, _ in EXAMPLES])
def test_an_example_runs(test, module, public):
    test.globs = namespace(module, test.name)
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    lines = []
    runner.run(test, out=lines.append, clear_globs=False)
    said = "".join(lines)
    if "NameError" in said and not public:
        missing = re.search(r"NameError: name ('\w+')", said)
        pytest.skip(f"not public, and about {missing[1]} in the middle of a transform")
    assert not runner.failures, said


def test_most_of_the_examples_are_public_ones():
    assert sum(public for _, _, public in EXAMPLES) > 35


def test_no_operator_is_without_an_example():
    named = {test.name.rpartition(".")[2] for test, _, _ in EXAMPLES}
    without = {"Product", "check_same", "restore_layout", "sequence_first", "unpack", "score_names"}
    assert set(fxprop.ops.__all__) - without <= named


def test_a_wrong_example_is_noticed():
    text = ">>> fxprop.ops.linear(torch.ones(1, 2), torch.ones(3, 2), k=1).shape\ntorch.Size([1, 4])\n"
    test = doctest.DocTestParser().get_doctest(text, {"torch": torch, "fxprop": fxprop}, "wrong", None, 0)
    lines = []
    runner = doctest.DocTestRunner(Checker(), verbose=False)
    runner.run(test, out=lines.append)
    assert runner.failures == 1
