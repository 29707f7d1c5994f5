"""How long the first training step takes, with an empty cache of compiled formulas and a filled one.

python examples/benchmarks/first_step.py resnet50 vit_b_16

Each row is a process of its own: steps in seconds, and what fxprop's log line says.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile

from tabulate import tabulate

STEPS = """
import logging, sys, time, torch, torchvision, fxprop
logging.basicConfig(level=logging.INFO, format="%(message)s")
name, batch, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
policy = fxprop.Policy(keep=0.25, score="l2")
x = torch.randn(batch, 3, size, size)
model = torchvision.models.get_model(name)
gm = model if sys.argv[4] == "dense" else fxprop.transform(model, policy, (x,)).module
for _ in range(3):
    start = time.perf_counter()
    gm(x).sum().backward()
    print("seconds", time.perf_counter() - start)
"""


def steps_of(*argv, **environment):
    """Seconds of each step, and the log line."""
    result = subprocess.run(
        [sys.executable, "-c", STEPS, *map(str, argv)],
        capture_output=True, text=True, check=True, env=os.environ | environment,
    )  # fmt: skip
    said = re.findall(r"fxprop: (compiling \d+ formulas by inductor took [\d.]+ s)", result.stderr)
    return [f"{float(s):.1f}" for s in re.findall(r"seconds ([\d.]+)", result.stdout)], "; ".join(said)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", help="torchvision classification models")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as cache:
            given = (name, args.batch, args.size)
            kinds = {
                "dense": {},
                "cold cache": {"TORCHINDUCTOR_CACHE_DIR": cache},
                "warm cache": {"TORCHINDUCTOR_CACHE_DIR": cache},
                "FXPROP_FUSE=0": {"FXPROP_FUSE": "0"},
            }
            for kind, environment in kinds.items():
                steps, said = steps_of(*given, kind.partition(" ")[0], **environment)
                rows.append((name, kind, *steps, said))
    print(
        tabulate(rows, ("model", "", "step 1, s", "step 2, s", "step 3, s", "log"), disable_numparse=True)
    )


if __name__ == "__main__":
    main()
