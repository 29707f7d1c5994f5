"""Gradients by a policy against the dense ones: numbers by hand in float64, what stays, the command."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprop
from fxprop.cli import main as cli
from fxprop.errors import InputError, ModelError

# a command finds models and mini-batches of its own by this module's name
HERE = f"{__name__}:"


def loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def batches(count=3, n=6):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 5, dtype=torch.float64, generator=generator), torch.arange(n) % 3)
        for _ in range(count)
    ]


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )


def no_batches():
    return []


def float_batches():
    return [(x.float(), y) for x, y in batches()]


def make_float_mlp():
    return make_mlp().float()


def by_hand(model, batch, keep):
    """Gradients of both weights and biases with the first layer's output gradient masked, and the energies."""
    first, tanh, last = model
    x, y = batch
    z = first(x)
    outputs = last(tanh(z))
    value = F.cross_entropy(outputs, y)
    at_z, last_weight, last_bias = torch.autograd.grad(value, (z, last.weight, last.bias))
    mask = torch.zeros_like(at_z)
    mask[:, at_z.square().sum(0).topk(keep).indices] = 1
    kept = at_z * mask
    found = {"0.weight": kept.T @ x, "0.bias": at_z.sum(0), "2.weight": last_weight, "2.bias": last_bias}
    return found, kept.square().sum().item(), at_z.square().sum().item()


def test_numbers_are_those_by_hand():
    model, given = make_mlp(), batches()
    gm, _ = fxprop.transform(model, fxprop.Policy(keep=0.25, score="l2", when="always"), (given[0][0],))
    found = fxprop.fidelity(gm, given, loss)
    sparse = [by_hand(model, batch, 2) for batch in given]
    dense = [by_hand(model, batch, 8)[0] for batch in given]

    def expected(names):
        def dot(a, b):
            return sum((a[n] * b[n]).sum().item() for n in names)

        after = dense[1:] + dense[:1]
        h = [grads for grads, _, _ in sparse]
        hh, gg = sum(map(dot, h, h)), sum(map(dot, dense, dense))
        progress = sum(map(dot, h, after)) / sum(map(dot, dense, after))
        cosine, norm = sum(map(dot, h, dense)) / math.sqrt(hh * gg), math.sqrt(hh / gg)
        return [cosine, norm, progress, max(progress, 0) ** 2 / norm**2]

    def numbers(row):
        return [row.cosine, row.norm, row.progress, row.best_progress]

    hidden, head, others = found.rows
    assert (hidden.name, hidden.kept, head.name, head.kept) == ("0", 0.25, "2", None)
    assert hidden.energy == pytest.approx(sum(s[1] for s in sparse) / sum(s[2] for s in sparse), rel=1e-9)
    assert numbers(hidden) == pytest.approx(expected(["0.weight"]), rel=1e-9)
    assert numbers(head) == pytest.approx([1, 1, 1, 1], rel=1e-9)
    assert numbers(others) == pytest.approx([1, 1, 1, 1], rel=1e-9)  # biases get all of the gradient
    assert numbers(found.overall) == pytest.approx(expected(dense[0]), rel=1e-9)
    assert found.overall.cosine < 0.99  # or the comparison would see nothing


def test_energy_of_entries_and_rows():
    model, given = make_mlp(), batches(2)
    for select, dim in (("element", 1), ("row", 0)):
        policy = fxprop.Policy(keep=0.5, select=select, score="l2", when="always")
        gm, _ = fxprop.transform(model, policy, (given[0][0],))
        found = fxprop.fidelity(gm, given, loss).rows[0].energy
        kept = total = 0.0
        for x, y in given:
            z = model[0](x)
            (grad,) = torch.autograd.grad(F.cross_entropy(model[2](model[1](z)), y), z)
            squares = grad.square() if dim else grad.square().sum(1)
            kept += squares.topk(squares.shape[dim] // 2, dim).values.sum().item()
            total += grad.square().sum().item()
        assert found == pytest.approx(kept / total, rel=1e-9)


def test_dense_is_1_everywhere():
    gm, _ = fxprop.transform(make_mlp(), 1.0, (batches()[0][0],))
    found = fxprop.fidelity(gm, batches(), loss)
    for row in (*found.rows, found.overall):
        assert [row.cosine, row.norm, row.progress, row.best_progress] == pytest.approx([1, 1, 1, 1])
    assert "1.000" in str(found)
    assert "%" not in str(found)  # nothing is selected


def test_all_stays_as_it_was():
    """Buffers of batch norm, random numbers of dropout, gradients, the policy in force."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 6, 6)
    gm, _ = fxprop.transform(make_net(), fxprop.Policy(keep=0.25, when="always"), (x,))
    given = [(torch.randn(4, 1, 6, 6), torch.arange(4) % 3) for _ in range(2)]
    loss(gm, given[0]).backward()
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    grads = [p.grad.clone() for p in gm.parameters()]
    code, state = gm.code, torch.get_rng_state()
    found = fxprop.fidelity(gm, given, loss)
    # the same dropout for both: what is behind it, and dense, has the same gradient
    assert found.rows[1].cosine == pytest.approx(1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert gm.code == code
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(gm.parameters(), grads, strict=True))


def test_what_is_in_a_wrapper():
    class Wrapper(nn.Module):
        """As DistributedDataParallel: it has the module as `module`."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            raise AssertionError("its reductions would wait for gradients that never arrive")

    gm, _ = fxprop.transform(make_mlp(), fxprop.Policy(keep=0.25, when="always"), (batches()[0][0],))
    plain, wrapped = (fxprop.fidelity(module, batches(), loss) for module in (gm, Wrapper(gm)))
    assert wrapped == plain


def test_a_part_of_the_mini_batch():
    given = [(x.float(), y) for x, y in batches(2, n=8)]
    gm, _ = fxprop.transform(make_float_mlp(), fxprop.Policy(examples=0.5), (given[0][0],))
    loss(gm, given[0]).backward()
    before = fxprop.kept_examples(gm)
    found = fxprop.fidelity(gm, given, loss)
    assert found.examples == 0.5
    assert "50% of the examples" in str(found)
    assert 0 < found.overall.cosine < 1
    assert fxprop.kept_examples(gm) == before


def test_what_is_refused():
    gm, _ = fxprop.transform(make_mlp(), 0.5, (batches()[0][0],))
    code = gm.code
    with pytest.raises(InputError, match="got 1 of at least two mini-batches"):
        fxprop.fidelity(gm, batches(1), loss)
    with pytest.raises(InputError, match="expected a tensor with one value"):
        fxprop.fidelity(gm, batches(), lambda module, batch: module(batch[0]))
    with pytest.raises(ZeroDivisionError):
        fxprop.fidelity(gm, batches(), lambda module, batch: 1 / 0)
    with pytest.raises(ModelError, match="expected the module that fxprop.transform returned"):
        fxprop.fidelity(make_mlp(), batches(), loss)
    assert gm.code == code


def test_command(capsys, tmp_path):
    arguments = [
        "fidelity",
        f"{HERE}make_float_mlp",
        "--input",
        "6x5",
        "--keep",
        "0.25",
        "--when",
        "always",
    ]
    assert cli.main([*arguments, "--batches", f"{HERE}float_batches", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batches"] == 3
    assert found["layers"][0]["kept"] == 0.25
    assert 0 < found["overall"]["cosine"] < 1
    assert cli.main([*arguments, "--plot", str(tmp_path / "f.svg")]) == 0
    out = capsys.readouterr().out
    assert "4 mini-batches" in out
    assert "On random numbers" in out
    assert (tmp_path / "f.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("command", ["fidelity", "plan"])
def test_the_inputs_shape_is_that_of_the_batches(capsys, command):
    assert cli.main([command, f"{HERE}make_float_mlp", "--batches", f"{HERE}float_batches", "-q"]) == 0
    assert capsys.readouterr().out.startswith("Sequential: ")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ("nowhere:f", "cannot import nowhere"),
        (f"{HERE}make_mlp", "expected pairs"),
        (f"{HERE}x", "has no 'x'"),
        (f"{HERE}no_batches", "it gives none"),
    ],
)
def test_command_says_what_is_wrong_with_batches(capsys, batches, message):
    arguments = ["fidelity", f"{HERE}make_float_mlp", "--input", "6x5", "--batches", batches]
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err
