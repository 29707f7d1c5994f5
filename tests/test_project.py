"""The shape of the code base: layers, a cheap import, and the private names of torch it leans on."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import fxprop

PACKAGE = Path(fxprop.__file__).parent

# each row may import only rows above it (and its own)
LAYERS = [
    ["errors", "version", "progress", "pytree", "frontends"],
    ["settings"],
    ["ops"],
    ["plan"],
    ["policy"],
    ["tracing"],
    ["graph"],
    ["compact"],
    ["report"],
    ["pipeline"],
    ["inspection"],
    ["training", "timing"],
    ["cli"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports_of(source):
    """Names of fxprop's own top-level parts that a file imports."""
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "fxprop":
            modules = [f"fxprop.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.startswith("fxprop."):
                yield module.split(".")[1]


def violations(files):
    return [
        f"{path} imports {imported}"
        for path, source in files.items()
        for imported in imports_of(source)
        if RANK[imported] > RANK[Path(path).parts[0].removesuffix(".py")]
    ]


def test_every_part_imports_only_what_is_above_it():
    files = {
        str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")
    }
    assert {Path(path).parts[0].removesuffix(".py") for path in files} == set(RANK)
    assert violations(files) == []


def test_the_layering_check_can_fail():
    assert violations({"ops/conv.py": "from fxprop.policy.policy import Policy"})
    assert violations({"plan.py": "from fxprop import policy"})


def files_imported(source, files):
    """Those of `files`, named as modules, that a file imports: anywhere in it, also under TYPE_CHECKING."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            # what is imported from a package may be a file of it
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in files else node.module for name in inner]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name for name in names if name in files}


def check_for_circles(files):
    TopologicalSorter({name: files_imported(source, files) for name, source in files.items()}).prepare()


def test_no_two_files_import_each_other():
    """Nor do more of them in a circle, whose files can only be understood all at once."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    assert "fxprop.plan.decisions" in files_imported(files["fxprop.report.records"], files)
    check_for_circles(files)


@pytest.mark.parametrize("back", ["from fxprop.a import A", "from fxprop import a", "import fxprop.a"])
def test_the_circle_check_can_fail(back):
    typed = f"if TYPE_CHECKING:\n    {back}"
    with pytest.raises(CycleError):
        check_for_circles({"fxprop.a": "from fxprop.b import B", "fxprop.b": typed})


def test_files_stay_small():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_import_is_cheap():
    """What fxprop's import adds to torch's own is none of the slow ones."""
    slow = "torchvision torch._dynamo torch._inductor torch.utils.flop_counter sympy torch.onnx triton"
    code = (
        "import sys, torch; before = set(sys.modules); import fxprop; "
        f"print([m for m in {slow.split()} if m in sys.modules and m not in before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist():
    assert len(fxprop.__all__) <= 27
    for name in fxprop.__all__:
        assert getattr(fxprop, name) is not None


def test_private_names_of_torch_are_still_there():
    """If one of these moves, the comment beside its use says what it was for."""
    from torch import _dynamo, fx, nn
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        FakeTensor,
        FakeTensorMode,
        UnsupportedOperatorException,
    )
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils import _pytree, checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    assert issubclass(DataDependentOutputException, RuntimeError)
    assert FakeTensorMode.__module__ == "torch._subclasses.fake_tensor"
    assert list(nn.Conv2d(1, 1, 3, padding=1)._reversed_padding_repeated_twice) == [1, 1, 1, 1]
    assert {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"} <= set(
        vars(nn.Linear(1, 1))
    )
    assert {"_parameters", "_buffers", "_modules"} <= set(vars(nn.Linear(1, 1)))
    assert torch.ops.aten._unsafe_view(torch.ones(4), (2, 2)).shape == (2, 2)
    assert _pytree.tree_leaves({"a": [1, (2,)]}) == [1, 2]
    pack, top = (lambda t: t), torch._C._autograd._top_saved_tensors_default_hooks
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert top(True)[0] is pack
    assert top(True) is None
    # what the accounts of runs, stand-ins and compiled children rely on
    weight = nn.Linear(2, 2).weight
    assert weight.untyped_storage()._cdata == weight.detach().untyped_storage()._cdata
    fake = FakeTensor(FakeTensorMode(), torch.empty(2, device="meta"), torch.device("cpu"))
    fake._is_param = True
    assert isinstance(fake, nn.Parameter)
    assert fake.device.type == "cpu"
    compiled = nn.Linear(2, 2)
    compiled.compile(backend="eager")
    assert vars(compiled)["_compiled_call_impl"] is not None
    assert FlopCounterMode(display=False).flop_registry[torch.ops.aten.mm] is not None
    assert torch.ops.aten.relu.default.decompose(torch.ones(1)) is NotImplemented
    assert UnsupportedOperatorException.__module__.startswith("torch._subclasses")
    strategy, action = (
        getattr(torch._C._dynamo.eval_frame, n) for n in ("_FrameExecStrategy", "_FrameAction")
    )
    assert strategy(action.SKIP, action.DEFAULT).cur_action == action.SKIP
    assert callable(_dynamo.lookup_backend("eager"))
    wrapped = torch.compile(nn.Linear(1, 1), backend="eager")
    assert (type(wrapped).__name__, list(wrapped._modules)) == ("OptimizedModule", ["_orig_mod"])
    assert "dynamo_ctx" in vars(wrapped)
    assert issubclass(checkpoint.CheckpointFunction, torch.autograd.Function)
    free = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(3, 4)).shape[0]
    assert isinstance(free, torch.SymInt)
    assert free.node.hint == 3
    # what graph modules are made of
    traced = fx.symbolic_trace(nn.Linear(1, 1))
    assert type(traced).__qualname__.endswith(".GraphModuleImpl")
    assert traced._graph is traced.graph
    assert traced._code == traced.code
    assert type(traced.graph._codegen) is fx.graph.CodeGen
    assert issubclass(fx.graph._PyTreeCodeGen, fx.graph.CodeGen)
    assert fx._pytree.tree_flatten_spec((1, [2]), _pytree.tree_structure((0, [0]))) == [1, 2]
    # what layers compute with
    assert callable(nn.Conv2d._conv_forward)
    assert nn.BatchNorm1d(1)._check_input_dim(torch.ones(2, 1)) is None
    statistics = torch._batch_norm_impl_index(torch.ones(2, 1), *[None] * 4, True, 0.1, 1e-5, False)
    assert (statistics[1].item(), len(statistics)) == (1, 5)
    assert isinstance(torch.ops.aten._grouped_mm.default, torch._ops.OpOverload)


def test_no_string_is_ever_evaluated():
    """What users write in policies, files and on the command line is data."""
    calls = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls.add(node.func.id)
    assert not calls & {"eval", "exec", "compile", "__import__"}
    assert "isinstance" in calls


def test_errors_are_one_family():
    from fxprop import errors

    subclasses = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(subclasses) > 6
    for error in subclasses:
        assert issubclass(error, fxprop.FxpropError)
    with pytest.raises(fxprop.FxpropError, match="keep"):
        fxprop.Policy(keep=2)


def test_what_0_1_saved_says_that_it_cannot_be_loaded():
    with pytest.raises(ImportError, match=r"a module that fxprop 0\.1 transformed.*restore\(gm\)"):
        __import__("fxprop.frontends.module")
