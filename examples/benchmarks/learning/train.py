"""One run: a method on a task until its budget of time is spent."""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .methods import METHODS, Method, Setting, unchanged
from .tasks import Images, Task, Text, loss_of

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# shares of the budget at which the test loss is measured, on the first of the test examples
MOMENTS = (0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
CURVE_EXAMPLES = 1000
# mini-batches that a method may plan by, and examples in them, at least
_BATCHES, _EXAMPLES = 6, 256
# share of the budget in which the learning rate rises
_RISE = 0.05


def rate_at(done: float) -> float:
    """The factor of the learning rate when a share of the budget is spent: a rise, then a cosine."""
    return min(1.0, (done + 1e-3) / _RISE) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def evaluate(module: nn.Module, data: Images | Text) -> tuple[float, float]:
    """Mean cross entropy, and accuracy in %."""
    was_training = module.training
    module.eval()
    loss = right = count = 0.0
    with torch.no_grad():
        for x, y in data.all():
            outputs = module(x)
            loss += loss_of(outputs, y).item() * y.numel()
            right += (outputs.argmax(-1) == y).sum().item()
            count += y.numel()
    module.train(was_training)
    return loss / count, 100 * right / count


def optimizer_of(task: Task, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    # those that get no gradient are left alone
    parameters = list(module.parameters())
    if task.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01)
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)


def warm_up(method: Method, task: Task, batch: int) -> None:
    """What is compiled or captured at first calls, before the clock starts; nothing is learnt."""
    with unchanged(method.module):
        for done in (0.0, 0.0, 1.0, 1.0) if method.warms_up else (0.0, 0.0):
            method.at(done)
            x, y = task.examples(batch)
            loss_of(method.module(x), y).backward()
            method.module.zero_grad()
    method.at(0.0)
    method.forget()


def run(
    task: Task,
    name: str,
    budget: float,
    lr: float,
    batch: int,
    seed: int,
    *,
    clock: str = "wall",
    curve: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train until `budget` seconds are spent; the learning rate reaches its end then.

    Every part of a step counts, from drawing the mini-batch to the optimizer and the method's own
    decisions. What happens once (tracing, compiling) is `setup`, and evaluation counts nowhere.
    """
    now = CLOCKS[clock]
    torch.manual_seed(seed)
    start = now()
    model = task.make_model().train()
    first = task.train.stream(batch, torch.Generator().manual_seed(seed + 1))
    batches = list(itertools.islice(first, max(_BATCHES, _EXAMPLES // batch)))
    method = METHODS[name](model, Setting(batches, loss_of, now, task.pretrained))
    warm_up(method, task, batch)
    setup, planned = now() - start, method.planning
    optimizer = optimizer_of(task, method.module, lr)
    stream = task.train.stream(batch, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    spent, steps, kept = 0.0, 0, []
    moments = list(MOMENTS) if curve else []
    points: list[tuple[float, int, float, float]] = []
    bar = tqdm(total=100, desc=f"{task.name} {name} {seed}", leave=False, disable=quiet or None)
    while spent < budget:
        start = now()
        method.at(spent / budget)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at(spent / budget)
        x, y = next(stream)
        optimizer.zero_grad()
        loss_of(method.module(x), y).backward()
        optimizer.step()
        kept.append(method.kept())
        steps += 1
        spent += now() - start - (method.planning - planned)
        planned = method.planning
        bar.update(int(100 * min(spent / budget, 1)) - bar.n)
        if moments and spent >= moments[0] * budget:
            moments = [m for m in moments if m * budget > spent]
            points.append((spent, steps, *evaluate(method.module, task.test.first(CURVE_EXAMPLES))))
    bar.close()
    quarters = [kept[steps * q // 4 : max(steps * (q + 1) // 4, 1)] for q in range(4)]
    found: dict[str, Any] = {
        "steps": steps,
        "spent": spent,
        "setup": setup,
        "planning": method.planning,
        "kept": [sum(part) / len(part) for part in quarters if part],
        "remark": method.remark,
        "curve": points,
    }
    # the test data have no part in the choice of a learning rate
    held = ("test", task.test) if curve else ("validation", task.validation)
    found[held[0]] = evaluate(method.module, held[1])
    return found


def pretrained(task: Task, seconds: float, clock: str, path: Path) -> dict[str, torch.Tensor]:
    """Weights after dense training for so long, without the last layer; kept in a file."""
    if not path.exists():
        now = CLOCKS[clock]
        torch.manual_seed(1234)
        model, spent = task.make_model().train(), 0.0
        optimizer = optimizer_of(task, model, 0.1)
        stream = task.train.stream(32, torch.Generator().manual_seed(1234))
        while spent < seconds:
            start = now()
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * rate_at(spent / seconds)
            x, y = next(stream)
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
            spent += now() - start
        loss, accuracy = evaluate(model, task.test)
        print(f"pretrained for {seconds:g} s: test loss {loss:.4f}, accuracy {accuracy:.2f} %")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({n: v for n, v in model.state_dict().items() if not n.startswith("head")}, path)
    return torch.load(path, weights_only=True)
