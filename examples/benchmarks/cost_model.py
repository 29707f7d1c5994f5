"""How well fxprop's built-in cost model foretells which layers win: predicted against measured, per layer.

python examples/benchmarks/cost_model.py resnet50 mobilenet_v3_large --keep 0.5 0.05
"""

import argparse
import math

import torch
from tabulate import tabulate
from torchvision import models

import fxprop
from fxprop.policy.cost_model import predicted_speedup
from fxprop.timing.tune import site_times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", help="torchvision classification models")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.05])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="list every layer, not only the misjudged")
    args = parser.parse_args()

    x = torch.randn(args.batch, 3, args.size, args.size)
    rows, right, errors = [], 0, []
    for name in args.models:
        model = models.get_model(name)
        for keep in args.keep:
            policy = fxprop.Policy(keep=keep, regions=False, when="always")
            gm, _ = fxprop.transform(model, policy, (x,))
            for site, sparsity, times in site_times(gm, (x,), args.rounds):
                predicted = predicted_speedup(site, sparsity)
                if predicted is None:
                    continue
                errors.append(abs(math.log(predicted / times.speedup)))
                agrees = (predicted >= 1) == (times.speedup >= 1)
                right += agrees
                if args.all or not agrees:
                    shape = "x".join(map(str, site.weight_shape))
                    rows.append((name, keep, site.name, shape, f"{predicted:.2f}", f"{times.speedup:.2f}"))
    if rows:
        print(tabulate(rows, ("model", "keep", "layer", "weight", "predicted", "measured")))
    errors.sort()
    print(
        f"{right} of {len(errors)} layers judged as measured; predicted and measured speed-up differ by a "
        f"factor of {math.exp(errors[len(errors) // 2]):.2f} (median)"
    )


if __name__ == "__main__":
    main()
