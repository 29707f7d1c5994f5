"""A backend for torch.compile that rewrites every graph it is given, and hands it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn

from fxprop import settings
from fxprop.compact.captured import batch_symbol, has_several, inputs_of, needs_backward
from fxprop.compact.choice import Choice
from fxprop.compact.compile import INNERS, compile_cut
from fxprop.compact.cut import CannotCut
from fxprop.errors import ExamplesError, InputError, ModelError
from fxprop.graph.find_sites import find_sites
from fxprop.graph.rewrite import rewrite_model
from fxprop.pipeline.put_in_force import adapt
from fxprop.pipeline.recipe import Examined, describe_examples
from fxprop.plan.sites import Site
from fxprop.policy.files import PolicyLike, as_policy
from fxprop.report.flops import make_report
from fxprop.report.report import Report
from fxprop.tracing.captured import trace_captured
from fxprop.tracing.observe.records import Run
from fxprop.tracing.observe.run import run_traced

Inner = str | Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def backend(policy: PolicyLike, inner: Inner = "inductor", model: nn.Module | None = None) -> Backend:
    """A torch.compile backend that makes the backward of every captured graph sparse.

    >>> backend = fxprop.backend(0.05)
    >>> compiled = torch.compile(model, backend=backend)
    >>> compiled(x).sum().backward()
    >>> print(backend.reports[0]); print(backend.graphs[0].code)

    Args:
        policy: as in `fxprop.transform`. Names are the parameters' paths (`layer1.0.conv1`) from the
            module whose code was captured; with `model` always from the model.
        inner: what compiles the rewritten graph: the name of a registered backend ("inductor",
            "aot_eager", "eager"), or a callable (gm, example_inputs) -> callable.
        model: the model that is compiled, only for the names of its parameters.

    Where code is captured in several graphs, the last layers of each count as output layers, as what
    follows is not known when a graph is compiled. Raises ModelError for an `inner` that is not known.
    """
    return Backend(policy, inner, model)


class Backend:
    """See `backend`."""

    def __init__(self, policy: PolicyLike, inner: Inner, model: nn.Module | None) -> None:
        self._policy = as_policy(policy)
        self._inner = inner
        self._compile = _lookup(inner)
        # which examples enter the backward; None where all do
        self.choice: Choice | None = None
        if self._policy.takes_examples:
            if inner not in INNERS:
                raise ModelError(
                    f"inner={inner!r} with examples={self._policy.examples!r}: expected one of "
                    f"{', '.join(INNERS)}, which can compile a backward in two parts"
                )
            self.choice = adapt(Choice(self._policy.examples), self._policy)
        self._names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        self._sites: list[Site] = []
        # one of each for every graph, in the order in which they were compiled
        self.reports: list[Report] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        takes_examples = self.choice is not None and needs_backward(example_inputs)
        symbol = None
        off, n = "", None
        if takes_examples and has_several(gm, example_inputs):
            n = next((int(tensor.shape[0]) for _, tensor in inputs_of(gm, example_inputs)), None)
            try:
                symbol = batch_symbol(gm, example_inputs)
            except CannotCut as reason:
                off = str(reason)
        traced = trace_captured(gm, example_inputs, self._names)
        try:
            run: Run | None = run_traced(traced, traced.training, tuple(example_inputs), {})
        except InputError:
            run = None  # then shapes and FLOPs stay unknown, and the graph is rewritten all the same
        sites = find_sites(traced, traced.training, run)
        self._sites.extend(sites)
        plan = self._policy.resolve(sites)
        rewrite_model(traced.root, traced.pieces, {traced.training: plan})
        module = traced.pieces[""]
        # the inner backend gets what it would have got: a module of the class it knows
        rewritten = fx.GraphModule(gm, module.graph)
        rewritten.meta.update(gm.meta)
        compiled: Callable[..., Any] | None = None
        if self.choice is not None and symbol is not None:
            try:
                compiled = compile_cut(rewritten, example_inputs, symbol, self.choice, str(self._inner))
            except CannotCut as reason:
                off = str(reason)
        self.reports.append(
            make_report(
                plan,
                None if run is None else run.backward_flops,
                model=f"graph {len(self.graphs)}",
                frontend=traced.frontend,
                mode="train" if torch.is_grad_enabled() else "eval",
                examples=describe_examples(self._policy, Examined(off, n)) if takes_examples else None,
            )
        )
        self.graphs.append(rewritten)
        return self._compile(rewritten, example_inputs) if compiled is None else compiled

    def set_examples(self, share: float | Literal["auto"]) -> None:
        """Let another share of the examples enter the backward; nothing is compiled again."""
        settings.check("examples", share, "backend")
        if self.choice is None:
            raise ExamplesError(
                "this backend was made for all examples: make it with "
                "fxprop.backend(fxprop.Policy(examples=...)); 1.0 can be set later"
            )
        self.choice.share = share

    def check_policy(self) -> None:
        """Raise PolicyError if a rule has matched no layer of any graph so far."""
        self._policy.check_all_match(self._sites)


def _lookup(inner: Inner) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    if callable(inner):
        return inner
    known = torch.compiler.list_backends(exclude_tags=())
    if inner not in known:
        raise ModelError(f"inner={inner!r}: expected a callable or one of {', '.join(known)}")
    # slow to import, and only needed here; torch has no public way from a name to a backend
    from torch import _dynamo as dynamo

    compiler: Callable[..., Callable[..., Any]] = dynamo.lookup_backend(inner)
    return compiler
