"""A torch.compile backend whose backward runs on the kept examples: AOTAutograd's graphs, cut and fed.

AOTAutograd traces forward and backward of a captured graph with a symbol for the number of examples; so
its backward serves any number of them. What is called here of torch is what its guide to custom backends
names (`torch._dynamo.backends.common.aot_autograd`), and a few names beside it, each of which says why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils.checkpoint import CheckpointPolicy

from fxprop.compact.captured import batch_symbol, has_several, needs_backward, parameter_names
from fxprop.compact.choice import Choice
from fxprop.compact.cut import CannotCut, Cut, find_cut
from fxprop.compact.flattened import size_of
from fxprop.compact.forward import Forward, read_forward
from fxprop.compact.rows import Layout
from fxprop.compact.run import CutBackward, noticing_dense, on_all, run_aten, with_reshapes

if TYPE_CHECKING:
    import sympy


class Compact:
    """A torch.compile backend that runs the backward of a graph on the examples that `choice` keeps.

    >>> torch.compile(model, backend=Compact(Choice(0.5)))
    """

    def __init__(self, choice: Choice) -> None:
        self._choice = choice

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if not needs_backward(example_inputs):
            return gm.forward
        if not has_several(gm, example_inputs):
            return on_all(gm.forward, self._choice)
        symbol = batch_symbol(gm, example_inputs)
        return compile_cut(gm, example_inputs, symbol, self._choice, "aot_eager")


# what can compile the two parts of a backward
INNERS = ("inductor", "aot_eager", "eager")


def compile_cut(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    symbol: sympy.Symbol,
    choice: Choice,
    inner: str,
) -> Callable[..., Any]:
    """A captured graph whose backward takes the examples of `choice`.

    `inner` is one of `INNERS`; "aot_eager" and "eager" run aten's kernels one by one. Raises CannotCut.
    """
    compiled = _Maker(choice, symbol, parameter_names(example_inputs)).compile(gm, example_inputs, inner)
    return noticing_dense(compiled, choice)


def examine_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], symbol: sympy.Symbol) -> Cut:
    """The cut that a captured graph would get; nothing is compiled. Raises CannotCut."""
    from torch._dynamo.backends.common import aot_autograd

    names = parameter_names(example_inputs)

    def partition(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        raise Found(_partition(joint, inputs, symbol, names, **options)[1])

    try:
        aot_autograd(fw_compiler=lambda graph, _: graph, partition_fn=partition)(gm, example_inputs)
    except Found as found:
        return found.cut
    raise CannotCut("no gradient is computed: nothing of the model requires one")


class Found(Exception):
    """Ends a trace when all is known."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut


def _partition(
    joint: fx.GraphModule,
    inputs: Sequence[Any],
    symbol: sympy.Symbol,
    names: frozenset[str],
    **options: Any,
) -> tuple[tuple[fx.GraphModule, fx.GraphModule], Cut]:
    """(forward, backward) as torch divides them, and where the backward is cut."""
    from functorch.compile import default_partition

    save_draws(joint.graph)
    forward, backward = default_partition(joint, inputs, **options)
    return (forward, backward), find_cut(backward, read_forward(forward.graph, symbol, names))


def save_draws(graph: fx.Graph) -> None:
    """Let what is drawn inside of a checkpoint be saved: for fewer examples, other numbers would be."""
    for node in graph.nodes:
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if is_random and "recompute" in node.meta:
            for drawn in (node, *(user for user in node.users if user.target is operator.getitem)):
                drawn.meta["recompute"] = CheckpointPolicy.MUST_SAVE


class _Maker:
    """Compiles one captured graph."""

    def __init__(self, choice: Choice, symbol: sympy.Symbol, parameters: frozenset[str]) -> None:
        self._choice, self._symbol, self._parameters = choice, symbol, parameters
        self._forward: Forward | None = None

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
        # donated buffers would refuse retain_graph
        with torch._functorch.config.patch(donated_buffer=False):
            if inner != "inductor":
                from torch._dynamo.backends.common import aot_autograd

                compiled: Any = aot_autograd(
                    fw_compiler=self._take_forward,
                    bw_compiler=self._take_backward,
                    partition_fn=self._divide,
                )(gm, example_inputs)
                return cast(Callable[..., Any], compiled)
            examine_graph(gm, example_inputs, self._symbol)  # before inductor takes operators apart
            # a backward from torch's cache on disk would not pass here, and run on all examples
            with (
                torch._functorch.config.patch(enable_autograd_cache=False),
                torch._inductor.config.patch(joint_custom_pre_pass=save_draws),
            ):
                from torch._inductor.compile_fx import compile_fx

                compiled = compile_fx(gm, list(example_inputs), inner_compile=self._take_for_inductor)
                return cast(Callable[..., Any], compiled)

    def _divide(self, joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        # a backward is compiled when it first runs; what cannot be cut must be known before
        return _partition(joint, inputs, self._symbol, self._parameters, **options)[0]

    def _read(self, gm: fx.GraphModule) -> None:
        self._forward = read_forward(gm.graph, self._symbol, self._parameters)
        # private: with donated_buffer off torch leaves None here, which its check of retain_graph takes for
        # buffers that were donated. tests/test_examples_training.py would notice
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        metadata.bw_donated_idxs = []

    def _take_forward(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._read(gm)
        return run_aten(gm)

    def _take_backward(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        assert self._forward is not None
        cut = find_cut(gm, self._forward)
        loss = None if cut.loss is None else run_aten(cut.loss)
        return CutBackward(cut, self._choice, loss, run_aten(with_reshapes(cut.compact)))

    def _take_for_inductor(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        if not options.get("is_backward"):
            self._read(gm)
            return compile_fx_inner(gm, example_inputs, **options)
        assert self._forward is not None
        cut = find_cut(gm, self._forward)
        options = {key: value for key, value in options.items() if key != "static_input_idxs"}
        loss = None
        if cut.loss is not None:
            loss = compile_fx_inner(cut.loss, [example_inputs[i] for i in cut.loss_inputs], **options)
        fakes = as_taken(cut, example_inputs)
        compact = compile_fx_inner(cut.compact, fakes, **options)
        return CutBackward(cut, self._choice, loss, compact, fixed_strides=True)


def as_taken(cut: Cut, example_inputs: Sequence[Any]) -> list[Any]:
    """Inputs for `cut.compact` with the strides of kept examples, which its own values get as well."""
    nodes = [node for node in cut.compact.graph.nodes if node.op == "placeholder"]
    fakes = []
    for node, given in zip(nodes, cut.inputs, strict=True):
        # what the forward saves may have other strides than its node foretold
        value = node.meta["val"] if given.from_loss else example_inputs[given.index]
        if isinstance(value, FakeTensor):
            with value.fake_mode:
                if given.from_loss:
                    value = value.contiguous()
                elif given.rows is not None:
                    value = _without_gaps(value)
        fakes.append(value)
    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
    FakeTensorProp(with_reshapes(cut.compact), mode).propagate_dont_convert_inputs(*fakes)
    return fakes


def _without_gaps(value: FakeTensor) -> Tensor:
    """As `rows.without_gaps`, of a tensor whose strides are symbols: compared, they would be fixed."""

    def rough(size: Any) -> int:
        expression = size_of(size)
        return int(expression.subs(dict.fromkeys(expression.free_symbols, 64)))

    layout = Layout.of([rough(stride) for stride in value.stride()])
    shape = [1 if d in layout.expanded else value.shape[d] for d in layout.order]
    dense = value.new_empty(shape).permute(layout.back)
    return dense.expand(value.shape) if layout.expanded else dense
