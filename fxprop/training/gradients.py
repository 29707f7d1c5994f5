"""Gradients by one policy after another, on the same mini-batches and random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprop.errors import InputError
from fxprop.pipeline.put_in_force import put_in_force, unwrap
from fxprop.pipeline.recipe import Recipe, attach, recipe_of
from fxprop.pipeline.set_keep import chosen_in
from fxprop.policy.policy import Policy
from fxprop.settings import AMOUNTS
from fxprop.training.fidelity_table import Products

Gradients = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]


class Compared:
    """A transformed module, taken out of what may wrap it, and mini-batches to compare policies on."""

    def __init__(self, gm: nn.Module, batches: Iterable[Any], loss: Loss) -> None:
        self.inner, self.loss = unwrap(gm), loss
        self.recipe: Recipe = recipe_of(self.inner)
        self.batches = list(batches)
        if len(self.batches) < 2:
            raise InputError(
                f"got {len(self.batches)} of at least two mini-batches: progress is measured on another one"
            )

    @property
    def dense(self) -> Policy:
        """The policy in force without anything sparse."""
        amounts: dict[str, Any] = {**dict.fromkeys(AMOUNTS), "keep": 1.0}
        return replace(self.recipe.in_force, **amounts, rules=(), examples=1.0, select="channel")

    def gradients(self, policy: Policy) -> Iterator[Gradients]:
        """Of the parameters, for each mini-batch."""
        with self.in_force(policy):
            for number, batch in enumerate(self.batches):
                torch.manual_seed(number)  # the same random numbers for every policy
                named = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
                grads = torch.autograd.grad(self.loss_of(batch), list(named.values()), allow_unused=True)
                yield {
                    name: torch.zeros_like(p) if grad is None else grad.to_dense().detach()
                    for (name, p), grad in zip(named.items(), grads, strict=True)
                }

    def loss_of(self, batch: Any) -> Tensor:
        """The loss on a mini-batch; InputError for what is none."""
        value = self.loss(self.inner, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InputError(
                f"the loss is {value!r}: expected a tensor with one value, and with a gradient"
            )
        return value

    @contextlib.contextmanager
    def in_force(self, policy: Policy) -> Iterator[None]:
        """`policy` for a while, then the one that was in force before."""
        before = recipe_of(self.inner)
        if policy is before.in_force:
            yield
            return
        put_in_force(self.inner, before, policy)
        try:
            yield
        finally:
            put_in_force(self.inner, before, before.in_force)
            attach(self.inner, before)

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Leaves buffers, the random state, and what "auto" has learnt as they were."""
        buffers = {name: buffer.clone() for name, buffer in self.inner.named_buffers()}
        choice, states = chosen_in(self.inner), _random_states()
        learnt, last = (None, None) if choice is None else (choice.state_dict(), choice.last)
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            if len(states) > 1:
                torch.cuda.set_rng_state_all(states[1:])
            with torch.no_grad():
                for name, buffer in self.inner.named_buffers():
                    buffer.copy_(buffers[name])
            if choice is not None and learnt is not None:
                choice.load_state_dict(learnt)
                choice.last = last


def _random_states() -> list[Tensor]:
    """Of the CPU, and of GPUs where they are in use."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    of_gpus = torch.cuda.get_rng_state_all() if in_use else []
    return [torch.get_rng_state(), *of_gpus]


def products_of(dense: list[Gradients], sparse: list[Gradients]) -> dict[str, Products]:
    """For each parameter, products of gradients, summed over the mini-batches."""
    return {name: _products(name, dense, sparse) for name in dense[0]}


def _products(name: str, dense: list[Gradients], sparse: list[Gradients]) -> Products:
    found = []
    for i, (g, h) in enumerate(zip(dense, sparse, strict=True)):
        after = dense[(i + 1) % len(dense)]
        pairs = ((g, g), (h, h), (h, g), (g, after), (h, after))
        found.append(Products(*(_dot(a[name], b[name]) for a, b in pairs)))
    return Products.total(found)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten().double(), b.flatten().double()))
