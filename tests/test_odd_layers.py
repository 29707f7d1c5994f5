"""Layers and tensors out of the ordinary: complex, nested, sparse, empty, and weights computed from weights."""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import Net
from torch import nn

import fxprop
from fxprop import errors, ops
from fxprop.errors import FxpropError, InputError, OpError

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")

DOUBLE = torch.float64
HALF = fxprop.Policy(keep=0.5, when="always")
FRONTENDS = ("symbolic", "submodules", "export")


class ByFunction(nn.Module):
    """The output layer behind a function of the model and its input; `in_code` cannot be traced."""

    def __init__(self, function, in_code=False, **parameters):
        super().__init__()
        self.function, self.in_code, self.o = function, in_code, nn.Linear(12, 4)
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        if self.in_code and x.real.sum() > 1e9:
            return x
        return self.o(torch.relu(self.function(self, x)))


def facts(report):
    return [(layer.name, layer.op, layer.status) for layer in report.layers]


def step(model, x, loss):
    """The output, and the parameters after a training step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(x)
    loss(output).backward()
    optimizer.step()
    return output, list(model.parameters())


def assert_same_step(ours, dense, x, loss):
    (output, updated), (expected, expected_updated) = step(ours, x, loss), step(dense, x, loss)
    assert torch.equal(output, expected)
    torch.testing.assert_close(updated, expected_updated, rtol=0, atol=0, equal_nan=True)


# --- complex ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_complex_model_is_skipped_as_a_whole_and_trains_as_it_did(frontend):
    model = nn.Sequential(*(nn.Linear(6, 6, dtype=torch.complex64) for _ in range(2)))
    x = torch.randn(4, 6, dtype=torch.complex64)
    gm, report = fxprop.transform(model, HALF, (x,), frontend=frontend)
    assert facts(report) == [("0", "linear", "skipped"), ("1", "linear", "skipped")]
    assert {layer.reason for layer in report.layers} == {"complex tensors have no sparse backward"}
    assert report.totals.other > 0
    assert_same_step(gm, model, x, lambda y: y.abs().sum())


@pytest.mark.parametrize("in_code", [False, True])
def test_complex_layers_are_skipped_and_the_others_are_not(in_code):
    def spectral(model, x):
        return model.b(torch.einsum("bi,io->bo", torch.fft.fft(x), model.w).real)

    model = ByFunction(spectral, in_code, w=torch.randn(6, 12, dtype=torch.complex64))
    model.b = nn.Linear(12, 12)
    _, report = fxprop.transform(model, HALF, (torch.randn(4, 6),))
    assert facts(report) == [
        ("w", "einsum", "skipped"),
        ("b", "linear", "rewritten"),
        ("o", "linear", "dense"),
    ]


def test_a_complex_weight_is_known_without_example_inputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64), nn.Conv2d(4, 4, 3))
    assert [site.skip is None for site in fxprop.layers(model)] == [False, True]


# --- products of parameters ---------------------------------------------------------------------------

PRODUCTS = {
    "matmul operator": lambda m: m.u @ m.v,
    "matmul": lambda m: torch.matmul(m.u, m.v),
    "mm": lambda m: m.u.mm(m.v),
    "bmm": lambda m: torch.bmm(m.u[None], m.v[None])[0],
    "addmm": lambda m: torch.addmm(m.s, m.u, m.v),
    "einsum": lambda m: torch.einsum("or,ri->oi", m.u, m.v),
    "linear": lambda m: F.linear(m.u, m.v.t()),
    "conv1d": lambda m: F.conv1d(m.u[:, :, None], m.v.t()[:, :, None])[:, :, 0],
    "chain": lambda m: torch.linalg.multi_dot([m.u, m.v, m.s]),
}


@pytest.mark.parametrize("in_code", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_of_parameters_is_part_of_the_weight_and_no_layer(product, in_code):
    torch.manual_seed(0)
    parameters = {"u": torch.randn(12, 3), "v": torch.randn(3, 6), "s": torch.randn(6, 6)}
    if product == "addmm":
        parameters["s"] = torch.randn(12, 6)
    weight, x = PRODUCTS[product], torch.randn(5, 6, dtype=DOUBLE)
    model = ByFunction(lambda m, x: F.linear(x, weight(m)), in_code, **parameters).double()
    gm, report = fxprop.transform(model, HALF, (x,))
    assert [fact[1:] for fact in facts(report)] == [("linear", "rewritten"), ("linear", "dense")]
    assert report.layers[0].weight_shape == (12, 6)
    if product not in ("chain", "conv1d"):
        assert report.totals.other == 2 * (2 * 12 * 3 * 6)  # grad_u and grad_v

    masked = oracle.masked_linear(oracle.Keep(keep=0.5))
    expected = copy.deepcopy(model)
    expected.function = lambda m, x: masked(x, weight(m))
    oracle.assert_same_gradients(oracle.gradients(gm, [x]), oracle.gradients(expected, [x]))


def test_front_ends_agree_on_products_of_parameters():
    model = ByFunction(lambda m, x: F.linear(x, m.u @ m.v), u=torch.randn(12, 3), v=torch.randn(3, 6))
    found = [facts(fxprop.estimate(model, HALF, (torch.randn(5, 6),), frontend=f)) for f in FRONTENDS]
    assert found == [[("u", "linear", "rewritten"), ("o", "linear", "dense")]] * 3


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_layer_of_torch_on_a_learned_input_is_a_layer(frontend):
    model = ByFunction(lambda m, x: m.f(m.q).sum(0) + m.f(x), q=torch.randn(7, 6))
    model.f = nn.Linear(6, 12)
    report = fxprop.estimate(model, HALF, (torch.randn(5, 6),), frontend=frontend)
    assert [(layer.name, layer.input_shape) for layer in report.layers] == [
        ("f", (7, 6)),
        ("f#2", (5, 6)),
        ("o", (5, 12)),
    ]


@pytest.mark.parametrize("in_code", [False, True])
def test_rows_of_an_embedding_are_an_input(in_code):
    model = ByFunction(
        lambda m, x: F.embedding(x, m.rows) @ m.w, in_code, rows=torch.randn(9, 6), w=torch.randn(6, 12)
    )
    report = fxprop.estimate(model, HALF, (torch.randint(9, (5,)),))
    assert [fact for fact in facts(report) if fact[0] != "rows"] == [
        ("w", "matmul", "rewritten"),
        ("o", "linear", "dense"),
    ]


# --- nested -------------------------------------------------------------------------------------------


def nested(layout=torch.jagged, *tail):
    parts = [torch.randn(length, *tail, 6, dtype=DOUBLE) for length in (3, 2, 4)]
    return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.parametrize("select", ["channel", "element"])
@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("tail", [(), (5,)])
def test_a_nested_tensor_has_the_gradients_of_its_rows(select, regions, tail):
    torch.manual_seed(0)
    model, x = Net().double(), nested(torch.jagged, *tail)
    policy = fxprop.Policy(keep=0.5, select=select, regions=regions, when="always")
    gm, report = fxprop.transform(model, policy, (torch.empty(2, 3, *tail, 6, dtype=DOUBLE),))
    assert [layer.status for layer in report.layers] == ["rewritten", "rewritten", "dense"]
    assert torch.equal(gm(x).values(), model(x).values())

    rows = copy.deepcopy(model)
    oracle.mask_model(rows, oracle.Keep(keep=0.5, select=select), except_for=("o",))

    class OfNested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = gm.a, gm.b, gm.o

        def forward(self, values):
            return gm(torch.nested.nested_tensor_from_jagged(values, x.offsets())).values()

    values = x.values().detach()
    oracle.assert_same_gradients(oracle.gradients(OfNested(), [values]), oracle.gradients(rows, [values]))


@pytest.mark.parametrize("policy", [HALF, fxprop.Policy.fast(0.5, when="always")])
def test_nested_and_dense_results_add_up(policy):
    class Residual(Net):
        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.o(torch.relu(self.b(h)) + h)

    model, x = Residual().double(), nested()
    gm, _ = fxprop.transform(model, policy, (torch.empty(2, 3, 6, dtype=DOUBLE),))
    _, updated = step(gm, x, lambda y: y.values().square().sum())
    _, of_rows = step(gm, x.values(), lambda y: y.square().sum())
    torch.testing.assert_close(updated, of_rows)


def test_a_nested_tensor_of_the_strided_layout_is_computed_densely():
    model, x = Net().double(), nested(torch.strided)
    gm, _ = fxprop.transform(model, HALF, (torch.empty(2, 3, 6, dtype=DOUBLE),))
    updated, expected = (step(m, x, lambda y: y.to_padded_tensor(0).square().sum())[1] for m in (gm, model))
    torch.testing.assert_close(updated, expected, rtol=0, atol=0)


def test_a_product_with_a_nested_tensor_is_computed_densely():
    x, w = nested(), torch.randn(6, 8, dtype=DOUBLE, requires_grad=True)
    ours, dense = (
        torch.autograd.grad(product(x, w).values().square().sum(), w)[0]
        for product in (lambda x, w: ops.matmul(x, w, k=2), torch.matmul)
    )
    assert torch.equal(ours, dense)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_nested_example_input_is_refused_with_what_to_pass(layout):
    x = nested(layout)
    for inputs, kwargs in (((x,), None), (None, {"x": x}), (([x],), None)):
        with pytest.raises(InputError, match="nested tensor of 3 parts.*pass a padded tensor"):
            fxprop.transform(Net().double(), HALF, inputs, example_kwargs=kwargs)
    padded = torch.nested.to_padded_tensor(x, 0.0)
    gm, _ = fxprop.transform(Net().double(), HALF, (padded,))
    assert gm(x).is_nested


# --- sparse, empty, and of the wrong kind -------------------------------------------------------------


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_an_input_in_a_sparse_layout_is_computed_densely(layout):
    x = getattr(torch.randn(5, 6, dtype=DOUBLE).relu(), layout)()
    w = torch.randn(8, 6, dtype=DOUBLE, requires_grad=True)
    for ours, dense in (
        (lambda: ops.linear(x, w, k=2), lambda: F.linear(x, w)),
        (lambda: ops.matmul(x, w.t(), k=2), lambda: x @ w.t()),
        (lambda: ops.linear_activation(x, w, activation="relu", k=2), lambda: F.linear(x, w).relu()),
    ):
        outputs = ours(), dense()
        assert torch.equal(*outputs)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), w)[0] for y in outputs))


class Convolutions(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.norm, self.b = kind(3, 8, 3), nn.BatchNorm2d(8), kind(8, 8, 3)
        self.o = nn.Linear(8, 4)

    def forward(self, x):
        return self.o(self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("policy", [HALF, fxprop.Policy.fast(0.5, when="always")], ids=["exact", "fast"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_examples_trains_as_the_dense_model_does(policy, kind, training):
    model = Convolutions(kind).train(training)
    gm, _ = fxprop.transform(model, policy, (torch.empty(2, 3, 8, 8),))
    assert_same_step(gm, model, torch.empty(0, 3, 8, 8), lambda y: y.sum())


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (2, 0, 6)])
@pytest.mark.parametrize("select", ["channel", "element"])
def test_example_inputs_without_examples_give_a_report_of_zeros(shape, select):
    model, x = Net(), torch.empty(shape)
    policy = fxprop.Policy(keep=0.5, select=select, when="always")
    gm, report = fxprop.transform(model, policy, (x,))
    assert report.totals.dense == report.totals.sparse == 0
    assert str(report)
    assert_same_step(gm, model, x, lambda y: y.sum())


def test_a_registered_score_need_not_know_of_empty_batches(monkeypatch):
    monkeypatch.setitem(ops.scores._SCORES, "linf", lambda g, dims: g.abs().amax(dims))
    w = torch.randn(8, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.linear(torch.empty(0, 6), w, k=2, score="linf").sum(), w)
    assert not grad.any()


@pytest.mark.parametrize(
    ("ours", "dense"),
    [
        (lambda x, w: ops.matmul(x, w, k=1), torch.matmul),
        (lambda x, w: ops.linear(x, w.t(), k=1), lambda x, w: F.linear(x, w.t())),
        (lambda x, w: ops.einsum("bi,io->bo", x, w, k=1), lambda x, w: torch.einsum("bi,io->bo", x, w)),
        (lambda x, w: ops.addmm(w[0], x, w, k=1), lambda x, w: torch.addmm(w[0], x, w)),
    ],
    ids=["matmul", "linear", "einsum", "addmm"],
)
@pytest.mark.parametrize(
    "x",
    [torch.tensor(1.0), torch.randn(2, 5), torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6) > 0],
    ids=["0-d", "sizes", "int", "bool"],
)
def test_what_the_dense_operator_refuses_is_a_runtime_error(ours, dense, x):
    w = torch.randn(6, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="."):
        dense(x, w)
    with pytest.raises(RuntimeError, match="."):
        ours(x, w)


# --- errors -------------------------------------------------------------------------------------------


def test_an_error_of_the_backward_is_caught_as_torchs_own_are():
    x, w = torch.randn(3, 6), torch.randn(8, 6, requires_grad=True)
    grad = torch.autograd.grad(ops.linear(x, w, k=2).square().sum(), w, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward through a sparse backward") as caught:
        grad.sum().backward()
    assert isinstance(caught.value, OpError)


def test_every_error_is_of_the_family():
    for error in vars(errors).values():
        if isinstance(error, type):
            assert issubclass(error, FxpropError)
