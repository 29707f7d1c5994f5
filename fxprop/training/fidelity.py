"""How close the backward of a transformed module is to the dense one, on mini-batches that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fxprop.inspection.decided_policy import make_decided_policy
from fxprop.ops.engine import observing
from fxprop.pipeline.recipe import Recipe
from fxprop.pipeline.set_keep import kept_examples
from fxprop.policy.policy import Policy
from fxprop.progress import counting
from fxprop.training.fidelity_table import Fidelity, Products, Row
from fxprop.training.gradients import Compared, Gradients, products_of

Batch = TypeVar("Batch")


def fidelity(
    gm: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    progress: bool = False,
) -> Fidelity:
    """Compare the parameters' gradients by the policy in force with the dense ones, before training.

    >>> gm, report = fxprop.transform(model, 0.25, (x,))
    >>> print(fxprop.fidelity(gm, loader, lambda gm, batch: loss(gm(batch[0]), batch[1])))

    Args:
        gm: what `fxprop.transform` returned, in the mode to be looked at, also wrapped by torch.compile or
            DistributedDataParallel: what is in the wrapper is looked at, by itself.
        batches: mini-batches, at least two: each is compared, and its progress measured on the next one
            (of the last: on the first).
        loss: the loss of the module on a mini-batch, a tensor with one value.
        progress: show a progress bar on standard error.

    For each layer's weight and over all parameters, with g the dense gradient and h the sparse one on the
    same mini-batch, g' the dense one on the next, summed over the mini-batches:
        energy: share of the squared output gradient that is kept where it arrives (layers);
        cosine: <h, g> / (|h| |g|); norm: |h| / |g|;
        progress: <h, g'> / <g, g'>, how much a small step along h lowers the loss on other data, dense = 1;
        progress at its best rate: the same with each step at the rate that is best for it,
        progress² / norm².

    Both backwards see the same random numbers. Parameters, their `grad`, buffers, the random state, the
    policy in force and what "auto" has learnt stay as they are. Raises ModelError for another module, and
    InputError for fewer than two mini-batches or a loss without a gradient. Source: the protocol of
    progress is that of GreenTrainer's importance (2309.13192), taken on a second mini-batch.
    """
    compared = Compared(gm, batches, loss)
    recipe = compared.recipe

    def gradients(policy: Policy) -> Iterator[Gradients]:
        for found in compared.gradients(policy):
            yield found
            count()

    shares = []
    with compared.as_it_was(), counting("gradients", progress, 3 * len(compared.batches)) as count:
        of_dense, of_sparse = list(gradients(compared.dense)), []
        for found in gradients(recipe.in_force):
            of_sparse.append(found)
            kept = kept_examples(compared.inner)
            shares.append(1.0 if kept is None else kept.share)
        energies = energies_of(compared.inner, recipe, gradients)
    products = products_of(of_dense, of_sparse)
    return _collect(compared.inner, recipe, products, energies, sum(shares) / len(shares), len(shares))


def _collect(
    gm: nn.Module,
    recipe: Recipe,
    products: Mapping[str, Products],
    energies: Mapping[str, tuple[float, float]],
    examples: float,
    batches: int,
) -> Fidelity:
    plan = recipe.plans[recipe.mode(gm.training)]
    names = names_of(gm)
    rows, taken = [], set()
    for decision in plan.decisions:
        name = weight_of(gm, decision.site.name, names)
        if name is None or name in taken or name not in products:
            continue
        taken.add(name)
        sparsity = decision.sparsity
        kept = None if sparsity is None else sparsity.share or sparsity.k / sparsity.n
        of_all, of_kept = energies.get(name, (0.0, 0.0))
        energy = of_kept / of_all if of_all else None
        rows.append(Row(decision.site.name, kept, energy, products[name]))
    rest = [p for name, p in products.items() if name not in taken]
    others = (Row("other parameters", None, None, Products.total(rest)),) if rest else ()
    return Fidelity(recipe.model, batches, examples, (*rows, *others), overall(products))


def overall(products: Mapping[str, Products]) -> Row:
    """The row of all parameters."""
    return Row("all", None, None, Products.total(list(products.values())))


def names_of(gm: nn.Module) -> dict[int, str]:
    """The parameters' names, as `weight_of` looks them up."""
    return {id(p): name for name, p in gm.named_parameters()}


def weight_of(gm: nn.Module, site: str, names: Mapping[int, str]) -> str | None:
    """The name of the parameter that is a site's weight; None where it is computed, or has another name."""
    name = site.partition("#")[0]
    for candidate in (f"{name}.weight", name, name.removesuffix(".in_proj") + ".in_proj_weight"):
        try:
            return names[id(gm.get_parameter(candidate))]
        except (AttributeError, KeyError):
            continue
    return None


def energies_of(
    gm: nn.Module, recipe: Recipe, gradients: Callable[[Policy], Iterator[Gradients]]
) -> dict[str, tuple[float, float]]:
    """Of each weight's layer, the squares of grad_output and of what is kept of it, over all mini-batches.

    Layers are seen one by one: without regions, and with all examples.
    """
    names = {p.data_ptr(): name for name, p in gm.named_parameters()}
    found: dict[str, tuple[float, float]] = {}

    def observe(weight: Tensor, grad: Tensor, kept: Tensor) -> None:
        name = names.get(weight.data_ptr())
        if name is not None:
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + _square(grad), before[1] + _square(kept))

    decided = make_decided_policy(recipe)
    rules = [replace(rule, regions=False) for rule in decided.rules]
    with observing(observe):
        for _ in gradients(replace(decided, rules=rules)):
            pass
    return found


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())
