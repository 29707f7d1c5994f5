"""Dense against transformed on the clock, interleaved in one process."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprop.errors import InputError
from fxprop.pipeline.arguments import ExampleInputs, check_inputs
from fxprop.pipeline.backend import backend
from fxprop.pipeline.recipe import is_transformed, recipe_of
from fxprop.pipeline.transform import transform
from fxprop.policy.files import PolicyLike, as_policy
from fxprop.policy.policy import Policy
from fxprop.policy.step_time import Clock
from fxprop.progress import count
from fxprop.pytree import tree_leaves
from fxprop.settings import AMOUNTS
from fxprop.timing.layer_times import now
from fxprop.timing.measurement import Measurement, SiteRow, Step, Variant
from fxprop.timing.tune import site_times, tune

_WARM_UP = 2


def measure(
    model: nn.Module,
    policies: PolicyLike | Sequence[PolicyLike],
    example_inputs: ExampleInputs = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    rounds: int = 10,
    compile: bool = False,
    amp: torch.dtype | None = None,
    sites: bool = False,
    tuned: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **transform_options: Any,
) -> Measurement:
    """Time training steps of `model`, dense and under each policy, in turn in one process.

    >>> print(fxprop.measure(model, [0.25, 0.05], (x,)))

    Args:
        model: on the device and in the mode and memory format to be measured. Its parameters are restored.
        policies: one or several, each as in `transform`.
        example_inputs, example_kwargs: real tensors. The loss is the mean square of the outputs.
        rounds: timed steps per variant, after two that are not timed; in every round each variant makes
            one step, so that a slow moment hits them all.
        compile: run every variant, the dense one too, through torch.compile.
        amp: run forward and loss under autocast with this dtype.
        sites: also time every rewritten layer's backward alone.
        tuned: `fxprop.tune` every transformed module first, with `cache` as its cache.
        progress: show a progress bar on standard error.
        transform_options: passed to `transform`.

    The step is forward, backward and SGD. Ratios are medians over the rounds of dense over sparse, with
    quartiles. Raises InputError for inputs without data or outputs without a gradient, and what
    `transform` raises.
    """
    args, kwargs = check_inputs(example_inputs, example_kwargs)
    _check_real((args, kwargs))
    given: list[PolicyLike] = (
        list(policies) if isinstance(policies, Sequence) and not isinstance(policies, str) else [policies]
    )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modules: dict[str, nn.Module] = {"dense": model}
    savings: dict[str, tuple[float, int, float | None]] = {"dense": (0.0, 0, None)}
    clocks: dict[str, Clock | None] = {}
    for policy in map(as_policy, given):
        gm, report = transform(
            model, policy, example_inputs, example_kwargs=example_kwargs, **transform_options
        )
        if tuned:
            report = tune(gm, example_inputs, example_kwargs=example_kwargs, cache=cache, progress=progress)
        name = _name(policy, modules)
        modules[name], clocks[name] = gm, report.clock
        rewritten = sum(layer.status == "rewritten" for layer in report.layers)
        savings[name] = (report.totals.saving or 0.0, rewritten, None if policy.rules else policy.keep)
    times_of = {
        name: tuple(site_times(gm, example_inputs, rounds, progress)) if sites and name != "dense" else ()
        for name, gm in modules.items()
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    runners = {
        name: _Runner(_compiled(gm, model) if compile else gm, args, kwargs, amp, device)
        for name, gm in modules.items()
    }
    steps: dict[str, list[Step]] = {name: [] for name in modules}
    try:
        for round_ in count(range(rounds + _WARM_UP), "steps", progress):
            for name, runner in runners.items():
                step = runner.step()
                if round_ >= _WARM_UP:
                    steps[name].append(step)
        memory = {name: runner.memory() for name, runner in runners.items()}
    finally:
        with torch.no_grad():
            for key, value in model.state_dict().items():
                value.copy_(before[key])
        model.zero_grad()
    variants = [
        Variant(
            name,
            *savings[name],
            tuple(steps[name]),
            *memory[name],
            tuple(SiteRow(site.name, s.k, s.n, *times) for site, s, times in times_of[name]),
            clocks.get(name),
        )
        for name in modules
    ]
    shapes = [
        "x".join(map(str, leaf.shape)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
    ]
    setting = {"input": " ".join(shapes), **_setting(device, rounds, compile, amp, tuned)}
    return Measurement(type(model).__name__, setting, tuple(variants))


def _compiled(gm: nn.Module, model: nn.Module) -> nn.Module:
    """Through torch.compile: by fxprop's backend where part of the mini-batch is taken."""
    policy = recipe_of(gm).in_force if is_transformed(gm) else None
    if policy is None or not policy.takes_examples:
        return cast(nn.Module, torch.compile(gm))
    return cast(nn.Module, torch.compile(model, backend=backend(policy, model=model)))


def _name(policy: Policy, taken: Mapping[str, Any]) -> str:
    """What tells the policy from others, in a few words."""
    amounts = {name: getattr(policy, name) for name in AMOUNTS if getattr(policy, name) is not None}
    amount = ", ".join(f"{name} {value:g}" for name, value in amounts.items()) or "rules"
    if policy.keep and policy == Policy.fast(policy.keep):
        return f"{amount}, fast"
    examples = policy.examples if policy.examples == "auto" else f"{policy.examples:g}"
    if policy.takes_examples and not (amounts.items() - {("keep", 1.0)}) and not policy.rules:
        amount = f"examples {examples}"
    elif policy.takes_examples:
        amount = f"examples {examples}, {amount}"
    extra = [
        *([policy.examples_select] if policy.examples_select != "importance" else []),
        *([policy.select] if policy.select != "channel" else []),
        *([policy.score] if policy.score != "l1" else []),
        *(["weights scored"] if policy.score_weight else []),
        *([f"scores from {policy.score_fraction:g}"] if policy.score_fraction != 1 else []),
        *(["norm grads kept"] if policy.norm_grad != "full" else []),
        *(["row-sparse"] if policy.weight_grad == "row_sparse" else []),
        *(["no regions"] if not policy.regions else []),
        *(["always"] if policy.when == "always" else []),
    ]
    name = ", ".join([amount, *extra])
    return name if name not in taken else f"{name} ({len(taken)})"


class _Runner:
    """Makes training steps with one module."""

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        amp: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs
        self._amp, self._device = amp, device
        # so small a rate that many steps leave the model where it is
        self._optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)

    def step(self) -> Step:
        """One training step, timed."""
        self._optimizer.zero_grad()
        start = now(self._device)
        loss = self._loss()
        forward = now(self._device)
        torch.autograd.backward(loss)
        backward = now(self._device)
        self._optimizer.step()
        return Step(forward - start, backward - forward, now(self._device) - backward)

    def memory(self) -> tuple[int, int | None]:
        """Bytes saved for the backward, and the highest allocation of a step."""
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in self._module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self._loss()
        saved = sum(size for pointer, size in sizes.items() if pointer not in own)
        del loss
        if self._device.type != "cuda":
            return saved, None
        torch.cuda.reset_peak_memory_stats(self._device)
        self.step()
        return saved, torch.cuda.max_memory_allocated(self._device)

    def _loss(self) -> Tensor:
        amp = self._amp
        with torch.autocast(self._device.type, dtype=amp) if amp else contextlib.nullcontext():
            outputs = tree_leaves(self._module(*self._args, **self._kwargs))
            losses = [
                t.float().square().mean() for t in outputs if isinstance(t, Tensor) and t.requires_grad
            ]
            if not losses:
                raise InputError(
                    "no output of the model requires a gradient: nothing to measure. Is it frozen, or "
                    "under no_grad?"
                )
            return torch.stack(losses).sum()


def _check_real(inputs: Any) -> None:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and (leaf.is_meta or type(leaf) is not Tensor):
            raise InputError(
                f"measure got a {type(leaf).__name__} on {leaf.device.type}: expected real tensors, "
                "which have data"
            )


def _setting(
    device: torch.device, rounds: int, compile: bool, amp: torch.dtype | None, tuned: bool
) -> dict[str, Any]:
    allocator = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "allocator": " ".join(f"{key}={value}" for key, value in allocator.items()) or "default",
        "rounds": rounds,
        **({"compile": True} if compile else {}),
        **({"amp": str(amp).removeprefix("torch.")} if amp else {}),
        **({"tuned": True} if tuned else {}),
    }
