"""Train on part of every mini-batch: python examples/part_of_batch.py --data data --examples auto

All examples go forward; the gradient of some, chosen by its norm, goes back. The bar shows how many.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from mnist_cnn import load, make_cnn
from torch import nn
from tqdm import tqdm

import fxprop


def share(text):
    return text if text == "auto" else float(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=share, default="auto", help="a share, 1 for all, or auto")
    parser.add_argument("--no-batch-norm", action="store_true", help="the model without batch norms")
    for name, default in {"data": "data", "epochs": 3, "batch": 64, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    batches = torch.utils.data.DataLoader(load(args.data, True), args.batch, shuffle=True)
    images, labels = load(args.data, False).tensors
    cnn = make_cnn("pool")
    if args.no_batch_norm:
        cnn = nn.Sequential(*(layer for layer in cnn if not isinstance(layer, nn.BatchNorm2d)))
    policy = fxprop.Policy(examples=args.examples)
    model, report = fxprop.transform(cnn, policy, (torch.empty(args.batch, 1, 28, 28),))
    print(report)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(1, args.epochs + 1):
        start, went_back = time.perf_counter(), []
        for x, y in (bar := tqdm(batches, f"epoch {epoch}", leave=False, disable=None)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            kept = fxprop.kept_examples(model)
            went_back.append(1.0 if kept is None else kept.share)
            bar.set_postfix_str("all examples" if kept is None else f"{kept.k} of {kept.n} examples")
        seconds = time.perf_counter() - start
        with torch.no_grad():
            predicted = torch.cat([model.eval()(part).argmax(1) for part in images.split(500)])
        model.train()
        accuracy = 100 * (predicted == labels).double().mean().item()
        mean = sum(went_back) / len(went_back)
        print(f"epoch {epoch}: accuracy {accuracy:.2f} %, {mean:.0%} of the examples, {seconds:.1f} s")


if __name__ == "__main__":
    main()
