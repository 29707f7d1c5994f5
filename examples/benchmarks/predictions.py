"""The time that the report expects beside the time that is measured, model by model.

python examples/benchmarks/predictions.py                   # the guide's eight models, keep 0.25 and 0.05
python examples/benchmarks/predictions.py resnet18 --keep 0.1 --fast
python examples/benchmarks/predictions.py --table examples/guide/speed.md --nth 3  # measured: in the page

Predictions are for the machine that `fxprop calibrate` measured, or for the usual one.

Ratios are dense over sparse, of the backward and of the whole step. The last lines count those that are off
by more than a quarter, and name the machine.
"""

import argparse
import re
from pathlib import Path

import torch
from tabulate import tabulate
from torchvision import models

import fxprop

MODELS = (
    "resnet18", "resnet50", "vgg11_bn", "vit_b_16",
    "densenet121", "convnext_tiny", "mobilenet_v3_large", "efficientnet_b0",
)  # fmt: skip


def read(table, keeps, nth=1):
    """(model, keep) -> (backward, step), of the nth table of a page whose headings are keep ratios."""
    text = re.split(r"(?=\| model \|)", Path(table).read_text(encoding="utf-8"))[nth]
    headings = re.search(r"\| model .*", text)[0]
    of_keeps = [float(keep) for keep in re.findall(r"keep ([\d.]+): backward", headings)]
    found = {}
    cell = r" [\d.]+x \([\d.-]+\) / [\d.]+x \|"
    for name, cells in re.findall(rf"^\| (\w+) \|((?:{cell})+)$", text, re.MULTILINE):
        ratios = re.findall(r"([\d.]+)x \([\d.-]+\) / ([\d.]+)x", cells)
        for keep, ratio in zip(of_keeps, ratios, strict=True):
            if keep in keeps:
                found[name, keep] = tuple(map(float, ratio))
    return found


def exact(keep):
    return fxprop.Policy(keep=keep, score="l2")


def measure(name, policy, keeps, batch, size, rounds):
    """The same, on this machine."""
    policies = [policy(keep) for keep in keeps]
    images = torch.randn(batch, 3, size, size)
    measured = fxprop.measure(models.get_model(name), policies, (images,), rounds=rounds)
    return {
        (name, keep): (measured.speedups(variant)[1], measured.speedups(variant, "total")[1])
        for keep, variant in zip(keeps, measured.variants[1:], strict=True)
    }


def expect(name, policy, batch, size):
    with torch.device("meta"):
        model, images = models.get_model(name), torch.empty(batch, 3, size, size)
    return fxprop.estimate(model, policy, (images,)).clock


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="torchvision classification models")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.05])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--fast", action="store_true", help="the fast preset, in place of exact l2 scores")
    parser.add_argument("--table", help="take what was measured from this page, in place of measuring")
    parser.add_argument("--nth", type=int, default=1, help="which of the page's tables")
    args = parser.parse_args()
    rows, off, all_of = [], 0, 0
    policy = fxprop.Policy.fast if args.fast else exact
    known = read(args.table, args.keep, args.nth) if args.table else {}
    for name in args.models:
        known |= {} if args.table else measure(name, policy, args.keep, args.batch, args.size, args.rounds)
        for keep in args.keep:
            row = [name, f"{keep:g}"]
            clock = expect(name, policy(keep), args.batch, args.size)
            for expected, measured in zip((clock.backward, clock.step), known[name, keep], strict=True):
                error = expected / measured - 1
                all_of, off = all_of + 1, off + (abs(error) > 0.25)
                row += [f"{expected:.2f}x", f"{measured:.2f}x", f"{100 * error:+.0f} %"]
            rows.append(row)
    what = ("expected", "measured", "off")
    headers = ["model", "keep", *(f"{part}: {of}" for part in ("backward", "step") for of in what)]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    print(f"\n{off} of {all_of} ratios are off by more than 25 %; torch {torch.__version__}")
    print(f"expected of {clock.machine}")


if __name__ == "__main__":
    main()
