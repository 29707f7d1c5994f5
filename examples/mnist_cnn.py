"""meProp for CNNs (1709.05804): python examples/mnist_cnn.py --data data --select channel --keep 0.05"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets, transforms
from tqdm import tqdm

import fxprop


def make_cnn(norm_after):
    layers = []
    for ins, outs in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(ins, outs, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers.insert(-2 if norm_after == "conv" else len(layers), nn.BatchNorm2d(outs))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, 10))


def load(data, train):
    digits = datasets.MNIST(data, train=train, transform=transforms.ToTensor(), download=True)
    return torch.utils.data.TensorDataset(torch.stack([x for x, _ in digits]), digits.targets)


def train(data, select="channel", keep=0.05, epochs=6, seed=0, norm_after="pool", quiet=False, **others):
    """Per epoch accuracy in % and seconds (backward, whole step); fxprop's report. others: policy, lr."""
    torch.manual_seed(seed)
    batches = torch.utils.data.DataLoader(load(data, True), 64, shuffle=True)
    images, labels = load(data, False).tensors
    sparse = fxprop.Policy(keep=keep, select="channel" if select == "dense" else select, when="always")
    policy = others.get("policy") or (1.0 if select == "dense" else sparse)
    model, report = fxprop.transform(make_cnn(norm_after), policy, (torch.empty(64, 1, 28, 28),))
    optimizer = torch.optim.Adam(model.parameters(), lr=others.get("lr", 1e-3))
    accuracies, times = [], []
    for epoch in range(1, epochs + 1):
        backward, start = 0.0, time.perf_counter()
        for x, y in tqdm(batches, f"epoch {epoch}", disable=quiet, leave=False):
            optimizer.zero_grad()
            loss, before = F.cross_entropy(model(x), y), time.perf_counter()
            loss.backward()
            backward += time.perf_counter() - before
            optimizer.step()
        times.append((backward, time.perf_counter() - start))
        with torch.no_grad():
            predicted = torch.cat([model.eval()(x).argmax(1) for x in images.split(500)])
        accuracies.append(accuracy := 100 * (predicted == labels).double().mean().item())
        model.train()
        print(f"epoch {epoch}: accuracy {accuracy:.2f} %, backward {backward:.2f} of {times[-1][1]:.2f} s")
    return accuracies, times, report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--select", choices=("element", "channel", "nonzero", "dense"), default="channel")
    parser.add_argument("--norm-after", choices=("pool", "conv"), default="pool")
    for name, default in {"data": "data", "keep": 0.05, "epochs": 6, "seed": 0, "lr": 1e-3}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    print(train(**vars(parser.parse_args()))[2])
