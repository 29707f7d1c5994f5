"""How much of a model zoo's backward fxprop reaches: `zoo_coverage.py --library timm --filter 'resnet*'`.

For every model: front-end, layers found and rewritten, the share of the FLOPs of all products with
parameters that is in layers which a policy can name, whether the forward is equal to the bit, whether the
gradients are those of a dense backward masked by hand, and seconds for the transform. Models are built
small, from their configurations, with random weights; nothing is downloaded.
"""

import argparse
import fnmatch
import json
import time
from pathlib import Path

import torch
from coverage_models import LIBRARIES, names_of
from coverage_oracle import forward_equal, gradients_equal, product_flops
from tabulate import tabulate
from tqdm import tqdm

import fxprop

HEADERS = ("model", "front-end", "found", "rewritten", "reached %", "forward", "gradients", "seconds")


def check(library: str, name: str, keep: float) -> dict:
    torch.manual_seed(0)
    model, args, kwargs = LIBRARIES[library](name)
    start = time.perf_counter()
    gm, report = fxprop.transform(model, keep, args, example_kwargs=kwargs)
    seconds = time.perf_counter() - start
    reached = sum(layer.forward for layer in report.layers)
    whole = product_flops(model, args, kwargs)
    return {
        "model": name,
        "front-end": report.frontend,
        "found": len(report.layers),
        "rewritten": sum(layer.status == "rewritten" for layer in report.layers),
        "reached %": round(100 * reached / whole, 2) if whole else 100.0,
        "forward": "equal" if forward_equal(model, gm, args, kwargs) else "DIFFERS",
        "gradients": gradients_equal(model, keep, args, kwargs),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, default="torchvision")
    parser.add_argument("--filter", default="*", help="glob on the model's name")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("-o", "--output", type=Path, help="writes OUTPUT.md and OUTPUT.json")
    options = parser.parse_args()
    names = fnmatch.filter(names_of(options.library), options.filter)
    if not names:
        parser.error(f"--filter {options.filter!r} matches no model of {options.library}")
    rows = []
    for name in tqdm(names, disable=None):
        try:
            rows.append(check(options.library, name, options.keep))
        except Exception as error:
            rows.append({"model": name, "front-end": f"FAILED: {type(error).__name__}: {error}"[:160]})
        table = tabulate([[row.get(h, "") for h in HEADERS] for row in rows], HEADERS, tablefmt="github")
        if options.output:  # after every model: a long run may be stopped
            options.output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
            text = json.dumps(rows, indent=2) + "\n"
            options.output.with_suffix(".json").write_text(text, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
