"""Code that takes another path by what its inputs are, or by the modes around it: the rewritten module takes the same."""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from compare import assert_equal, names_the_line, outcome, surroundings
from models import MAY_RUN_AS_WRITTEN, Cases, X, transform
from torch import nn

import fxprop
from fxprop.errors import TraceError

pytestmark = MAY_RUN_AS_WRITTEN

MASK = X > 0

# --- by what the inputs are


@functools.singledispatch
def doubled(x):
    return x


@doubled.register
def _(x: torch.Tensor):
    return x * 2


@dataclass
class Batch:
    x: torch.Tensor
    mask: torch.Tensor | None = None


TYPES = Cases(
    Cases.of(
        X,
        asks_isinstance_tensor=lambda self, x: self.body(x * 2 if isinstance(x, torch.Tensor) else x),
        asks_is_tensor=lambda self, x: self.body(x * 2 if torch.is_tensor(x) else x),
        asks_type_is=lambda self, x: self.body(x * 2 if type(x) is torch.Tensor else x),
        asks_class_equals=lambda self, x: self.body(x * 2 if x.__class__ == torch.Tensor else x),
        asks_issubclass=lambda self, x: self.body(x * 2 if issubclass(type(x), torch.Tensor) else x),
        asks_for_no_parameter=lambda self, x: self.body(x if isinstance(x, nn.Parameter) else x * 2),
        asks_hasattr=lambda self, x: self.body(x if hasattr(x, "tensors") else x * 2),
        asks_getattr_with_a_default=lambda self, x: self.body(x * getattr(x, "scale_of_mine", 3.0)),
        asks_callable=lambda self, x: self.body(x() if callable(x) else x * 2),
        asks_a_table_for_its_type=lambda self, x: self.body(x * {torch.Tensor: 2.0}.get(type(x), 5.0)),
        asks_for_its_dtype_as_text=lambda self, x: self.body(x * (2 if "float32" in str(x.dtype) else 5)),
        asks_for_its_shape_as_text=lambda self, x: self.body(x * len(f"{x.shape}")),
        dispatches_on_the_class=lambda self, x: self.body(doubled(x)),
    )
    | Cases.of(
        MASK, asks_for_its_dtype=lambda self, x: self.body(x.float() * 2 if x.dtype == torch.bool else x)
    )
    | Cases.of(X, X + 1, compares_identities=lambda self, x, y: self.body(y if x is y else x + y))
    | Cases.of(
        [X, X],
        takes_a_list_apart=lambda self, x: self.body(x[0] + x[1] if isinstance(x, list | tuple) else x[0]),
        concatenates_a_list=lambda self, x: self.body(torch.cat(x) if isinstance(x, list | tuple) else x),
        goes_through_a_list=lambda self, x: self.body(sum(t * i for i, t in enumerate(x))),
        adds_lists=lambda self, x: self.body(torch.cat([*x, *(x + x)])),
    )
    | Cases.of(
        (X, X), takes_a_tuple_apart=lambda self, x: self.body(x[0] + x[1] if type(x) is tuple else x[0])
    )
    | Cases.of(
        {"x": X},
        gets_what_is_missing=lambda self, x: self.body(x["x"] if x.get("m") is None else x["x"] * x["m"]),
        asks_for_a_key=lambda self, x: self.body(x["x"] * x["m"] if "m" in x else x["x"] * 2),
        asks_for_a_mapping=lambda self, x: self.body(x["x"] * 2 if isinstance(x, Mapping) else x[0]),
    )
    | Cases.of(
        {"x": X, "m": MASK},
        gets_what_is_there=lambda self, x: self.body(x["x"] if x.get("m") is None else x["x"] * x["m"]),
        goes_through_a_dict=lambda self, x: self.body(sum(value for value in x.values()) * len(x)),
        takes_a_dict_as_keywords=lambda self, x: self.body(torch.mul(**{"input": x["x"], "other": x["m"]})),
    )
    | Cases.of(
        Batch(X),
        asks_for_its_own_class=lambda self, x: self.body(x.x * 2 if isinstance(x, Batch) else x),
        asks_for_a_field=lambda self, x: self.body(x.x if x.mask is None else x.x * x.mask),
    )
    | Cases.of(X, X, counts_its_arguments=lambda self, *xs: self.body(xs[0] * len(xs)))
    | Cases.of(X, 2.0, takes_a_number=lambda self, x, s: self.body(x * s if isinstance(s, float) else x))
)


@TYPES(inputs=(), x=X, scale=2.0)
def takes_keywords(self, **batch):
    return self.body(batch["x"] * batch.get("scale", 1.0) * len(batch))


@TYPES()
def matches_a_class(self, x):
    match x:
        case torch.Tensor():
            return self.body(x * 2)
        case _:
            return self.body(x)


@TYPES(inputs=([X, X],))
def matches_a_list(self, x):
    match x:
        case [first, second]:
            return self.body(first + second)
        case _:
            return self.body(x[0])


@TYPES()
def catches_an_error_of_a_shape(self, x):
    try:
        x = x.view(-1, 5)
    except RuntimeError:
        x = x * 2
    return self.body(x)


@TYPES(inputs=(X, X.double()))
def catches_an_error_of_a_product(self, x, y):
    try:
        h = self.a(y)
    except RuntimeError:
        h = self.a(y.float()) * 2
    return self.o(self.b(h) + self.a(x))


@TYPES()
def catches_whatever(self, x):
    try:
        scale = float(len(x))
    except Exception:
        scale = 9.0
    return self.body(x * scale)


@TYPES()
def suppresses_an_error(self, x):
    scale = 9.0
    with contextlib.suppress(TypeError, RuntimeError):
        scale = int(x.shape[0])
    return self.body(x * scale)


# --- by the names and defaults of arguments

ONES, TWO = torch.ones(6), torch.tensor(2.0)
NAMES = Cases(
    Cases.of(
        X,
        MASK,
        nan=lambda self, x, nan: self.body(torch.where(nan, float("nan"), x).nan_to_num(0.5)),
        inf=lambda self, x, inf: self.body(torch.where(inf, float("inf"), x).clamp(max=2.0)),
        device=lambda self, x, device: self.body(x + device + torch.ones(6, device=torch.device("cpu"))),
        torch=lambda self, x, torch: self.o(self.b(self.a(x + torch).relu()).softmax(-1)),
        getattr=lambda self, input, getattr: self.body(input + getattr),
        pytree=lambda self, fx_pytree, pytree: self.body(fx_pytree + pytree),
        fxprop_ops_linear=lambda self, x, fxprop_ops_linear: self.body(x + fxprop_ops_linear),
        names_of_layers=lambda self, a, b: self.body(a + b),
    )
    | Cases.of(
        X,
        a_tensor_is_a_default=lambda self, x, t=TWO: self.body(x) * t,
        a_tensor_is_a_keyword_default=lambda self, x, *, shift=ONES: self.body(x + shift),
        tensors_are_a_default=lambda self, x, shifts=(ONES, ONES): self.body(x + shifts[0] + shifts[1]),
    )
)

# --- by the modes around the call, or in other modes than those

MODES = Cases.of(
    X,
    asks_for_grad_mode=lambda self, x: self.body(x * 2 if torch.is_grad_enabled() else x),
    asks_for_autocast=lambda self, x: self.body(x * 2 if torch.is_autocast_enabled("cpu") else x),
    asks_for_any_autocast=lambda self, x: self.body(x * 2 if torch.is_autocast_cpu_enabled() else x),
    asks_for_inference_mode=lambda self, x: self.body(x * 2 if torch.is_inference_mode_enabled() else x),
    asks_for_the_default_dtype=lambda self, x: self.body(x.to(torch.get_default_dtype())),
)


@MODES()
def asks_whether_a_result_requires_grad(self, x):
    h = self.a(x)
    return self.o(torch.relu(self.b(h * 2 if h.requires_grad else h)))


@MODES()
def switches_autocast_off(self, x):
    h = self.a(x)
    with torch.autocast("cpu", enabled=False):
        h = self.b(h.float())
    return self.o(h)


@MODES()
def switches_autocast_on(self, x):
    h = self.a(x)
    with torch.autocast("cpu", torch.bfloat16):
        h = self.b(h)
    return self.o(h.float())


class Decorated:
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def dense(layer, x):
        return layer(x.float())

    @staticmethod
    @torch.no_grad()
    def target(layer, x):
        return layer(x)


@MODES()
def calls_what_is_decorated_with_autocast(self, x):
    return self.o(Decorated.dense(self.b, self.a(x)))


@MODES()
@torch.autocast("cpu", torch.bfloat16)
def is_decorated_with_autocast(self, x):
    return self.body(x)


@MODES()
def calls_what_is_decorated_with_no_grad(self, x):
    return self.o(self.a(x) - Decorated.target(self.b, self.a(x)))


@MODES()
@torch.no_grad()
def is_decorated_with_no_grad(self, x):
    return self.body(x)


@MODES()
def switches_grad_off_and_on(self, x):
    torch.set_grad_enabled(False)
    h = self.a(x)
    torch.set_grad_enabled(True)
    return self.o(self.b(h))


@MODES()
def switches_grad_by_training(self, x):
    with torch.set_grad_enabled(self.training):
        h = self.a(x)
    return self.o(self.b(h))


@MODES()
def switches_grad_on(self, x):
    with torch.no_grad():
        h = self.a(x)
        with torch.enable_grad():
            h = h + self.b(torch.relu(h))
    return self.o(h)


@MODES()
def detaches_by_a_context_only(self, x):
    with torch.no_grad():
        scale = x.mean()
    return self.body(x * scale)


# --- checks, which say what they found

CHECKS = Cases()


@CHECKS()
def asserts_by_torch(self, x):
    torch._assert(x.dim() == 2, f"got {x.dim()} dimensions")
    return self.body(x)


@CHECKS()
def asserts(self, x):
    assert x.dim() == 2, f"got {x.dim()} dimensions"
    return self.body(x)


@CHECKS()
def raises(self, x):
    if x.dim() != 2:
        raise ValueError(f"expected 2 dimensions, got a tensor of {tuple(x.shape)}")
    return self.body(x)


ALL = TYPES | NAMES | MODES | CHECKS
AROUND = {
    "nothing": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def assert_same_outcome(gm, case, arounds=("nothing", "no_grad")):
    untouched = case.make()
    for mode in (True, False):
        for name in arounds:
            results = []
            for module in (gm.train(mode), untouched.train(mode)):
                with AROUND[name]():
                    results.append(outcome(module, case.inputs, case.kwargs))
                torch.set_grad_enabled(True)  # what the code itself left is compared
            assert_equal(*results, f"training = {mode}, around it: {name}")


@pytest.mark.parametrize("name", ALL)
def test_every_call_takes_the_way_the_model_would(name):
    case = ALL[name]
    model, around = case.make(), surroundings()
    gm, _ = transform(model, *case.inputs, example_kwargs=case.kwargs)
    assert_equal(surroundings(), around, "around it")
    assert_same_outcome(gm, case, AROUND if name in MODES else ("nothing", "no_grad"))
    assert_same_outcome(fxprop.restore(gm), case)


@pytest.mark.parametrize("around", ["autocast", "no_grad"])
@pytest.mark.parametrize("name", MODES)
def test_a_mode_around_the_transform_is_not_frozen(name, around):
    case, model = MODES[name], MODES[name].make()
    with AROUND[around]():
        before = surroundings()
        gm, _ = transform(model, *case.inputs)
        assert_equal(surroundings(), before, "around it")
    assert_same_outcome(gm, case, ("nothing", "autocast", "no_grad"))


@pytest.mark.parametrize("name", ALL)
def test_symbolic_is_right_or_names_the_line(name):
    case = ALL[name]
    model, before = case.make(), surroundings()
    try:
        gm, _ = transform(model, *case.inputs, example_kwargs=case.kwargs, frontend="symbolic")
    except TraceError as error:
        refused = error
    else:
        assert_same_outcome(gm, case, AROUND if name in MODES else ("nothing", "no_grad"))
        return
    assert names_the_line(refused, case, Decorated.dense, Decorated.target), refused
    assert_equal(surroundings(), before, "around it")
    report = transform(case.make(), *case.inputs, example_kwargs=case.kwargs)[1]
    found = report.to_dict()
    assert found["frontend"] == "submodules"
    reasons = {part["name"]: part["reason"] for part in found["untraced"]}
    assert names_the_line(reasons[""], case, Decorated.dense, Decorated.target)
    assert "as written" in str(report)


@pytest.mark.parametrize("name", CHECKS)
def test_a_failed_check_says_what_the_model_would(name):
    case, wrong = CHECKS[name], torch.randn(2, 4, 6)
    gm, _ = transform(case.make())
    with pytest.raises((AssertionError, ValueError)) as theirs:
        case.make()(wrong)
    with pytest.raises(theirs.type) as ours:
        gm(wrong)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


@pytest.mark.parametrize("name", ["switches_grad_off_and_on", "is_decorated_with_no_grad"])
def test_a_layer_without_gradient_has_none_in_the_report(name):
    report = transform(MODES[name].make())[1]
    assert {layer.name: layer.dense.total for layer in report.layers}["a"] == 0
