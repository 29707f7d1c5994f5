"""What fxprop.recommend and fxprop.fidelity say of a task's model after some steps of dense training."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fxprop

from .tasks import Task, loss_of
from .train import optimizer_of

POLICIES = {
    "channel-25": fxprop.Policy(keep=0.25, score="l2"),
    "channel-5": fxprop.Policy(keep=0.05, score="l2"),
    "element-5": fxprop.Policy(keep=0.05, select="element"),
    "examples-50": fxprop.Policy(examples=0.5),
}


def plan(task: Task, steps: list[int], lr: float, batch: int, batches: int = 6) -> Iterator[str]:
    """The recommendation, and the gradients of each policy as a whole, after each of `steps`."""
    torch.manual_seed(0)
    stream = task.train.stream(batch, torch.Generator().manual_seed(0))
    gm, _ = fxprop.transform(task.make_model().train(), 1.0, (task.examples(batch)[0],))
    optimizer, done = optimizer_of(task, gm, lr), 0
    for number in steps:
        for x, y in itertools.islice(stream, number - done):
            optimizer.zero_grad()
            loss_of(gm(x), y).backward()
            optimizer.step()
        done, given = number, list(itertools.islice(stream, batches))
        needed = [p.requires_grad for p in gm.parameters()]
        found = fxprop.recommend(gm, given, _loss, freeze=task.pretrained)
        yield f"{task.name} after {number} dense steps of {batch}\n\n{found.render('github')}"
        for parameter, needs in zip(gm.parameters(), needed, strict=True):
            parameter.requires_grad_(needs)
        for name, policy in POLICIES.items():
            fxprop.set_keep(gm, policy)
            of = fxprop.fidelity(gm, given, _loss).overall
            yield (
                f"{name}: cosine {of.cosine:.3f}, norm {of.norm:.3f}, progress {of.progress:.3f}, "
                f"at the best rate {of.best_progress:.3f}"
            )
        fxprop.set_keep(gm, fxprop.Policy(keep=1.0))


def _loss(gm: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss_of(gm(batch[0]), batch[1])
