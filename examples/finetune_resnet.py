"""Fine-tune a torchvision model with a cheaper backward, and see what it saves.

python examples/finetune_resnet.py                                   # offline, random weights
python examples/finetune_resnet.py --weights DEFAULT --keep 0.1      # downloads pretrained ones
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torchvision import models

import fxprop


def train(module, images, labels, steps):
    """Losses, and seconds per (backward, whole step)."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = F.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        before = time.perf_counter()
        loss.backward()
        after = time.perf_counter()
        optimizer.step()
        seconds.append((after - before, time.perf_counter() - start))
        losses.append(loss.item())
    return losses, [statistics.median(part) for part in zip(*seconds[1:], strict=True)]


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", help="such as DEFAULT; left out: random weights, no download")
    for name, default in {"model": "resnet18", "keep": 0.1, "steps": 6, "batch": 8, "size": 224}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    dense = models.get_model(args.model, weights=args.weights)
    images = torch.randn(args.batch, 3, args.size, args.size)  # your data here
    labels = torch.randint(0, 1000, (args.batch,))

    sparse, report = fxprop.transform(dense, args.keep, (images,))
    print(report)
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    results = {}
    for name, module in {"dense": dense, f"keep {args.keep:g}": sparse}.items():
        module.load_state_dict(state)  # the same keys: both start alike
        losses, results[name] = train(module, images, labels, args.steps)
        print(f"{name}: losses {', '.join(f'{loss:.3f}' for loss in losses)}")
    (slow, slow_step), (fast, fast_step) = results.values()
    print(f"backward {slow / fast:.2f}x, whole step {slow_step / fast_step:.2f}x as fast as dense")


if __name__ == "__main__":
    main()
