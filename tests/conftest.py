"""Options of the test suite."""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import kept_nets
import long_tests
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption(
        "--networks",
        type=int,
        default=120,
        help="how many random networks test_random_networks.py draws (default: 120)",
    )
    parser.addoption(
        "--update-golden", action="store_true", help="write the texts in tests/golden anew, to be reviewed"
    )
    parser.addoption(
        "--record-durations",
        action="store_true",
        help="write tests/durations.json, by which tests are slow",
    )


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    long_tests.mark_slow(items, json.loads(long_tests.FILE.read_text(encoding="utf-8")))


def pytest_configure(config):
    if config.getoption("--record-durations") and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(long_tests.Recorder())
    # texts are as wide as where there is no terminal, wherever the tests run
    os.environ.pop("COLUMNS", None)
    # and predictions are for the usual machine
    os.environ["FXPROP_MACHINE"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the processes share the cores


@pytest.fixture
def golden(request):
    """`golden(name, text)` compares a text with the one in tests/golden."""

    def check(name, text):
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.exists(), f"{file} is missing: pytest --update-golden writes it"
        assert text == file.read_text(encoding="utf-8"), "pytest --update-golden writes it anew"

    return check


@pytest.fixture(scope="module")
def resnet():
    """A transformed ResNet-18 and its report."""
    # here: coverage is measured of what is imported after this file
    import torchvision
    from models import transformed

    with torch.device("meta"):
        model = torchvision.models.resnet18()
    return transformed(model, (8, 3, 224, 224))


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def made():
    """What `kept_nets.make` makes, once for the tests of a file."""
    return kept_nets.make()


@pytest.fixture
def net(made):
    """(the model, ours, what chooses its examples): one of each for many tests, as if just made."""
    model, gm, choice = made
    model.zero_grad(), gm.zero_grad()
    choice.share, choice.last = 0.5, None
    return model, gm, choice


@pytest.fixture
def whatever_is_set(monkeypatch):
    """Tests of the loops over kept entries are of the loops, also where the suite is run without them."""
    monkeypatch.delenv("FXPROP_SPARSE", raising=False)


@pytest.fixture
def forced(monkeypatch, whatever_is_set):
    """Loops wherever they can run; the list has an item for each of their calls."""
    from fxprop.ops.entries import products

    calls = []

    def counted(*args):
        calls.append(args)
        return gradients(*args)

    gradients = products.gradients
    monkeypatch.setenv("FXPROP_SPARSE", "always")
    monkeypatch.setattr(products, "gradients", counted)
    return calls


@pytest.fixture
def memory_given_back():
    """The C library keeps gigabytes of what large models leave behind, in pieces that others do not fit."""
    yield
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
