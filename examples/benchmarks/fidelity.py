"""How close the fast preset is to the exact rule: gradients, and accuracy on MNIST.

python examples/benchmarks/fidelity.py --data data --seeds 3 --keep 0.25 0.05

The network has batch norm right behind its convolutions, so that every part of the preset is at work.
Cosines are between the gradients by the two at the same keep ratio, over all training batches of an epoch
with the network trained by the exact rule so far; after it, both against the dense gradients.
"""

import argparse
import copy
import itertools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate

import fxprop

sys.path.insert(0, str(Path(__file__).parents[1]))
from mnist_cnn import load, make_cnn, train


def policies(keep):
    # small layers: the cost model would leave some of them, or their regions, alone
    return {
        "exact": fxprop.Policy(keep=keep, score="l2", when="always"),
        "fast": fxprop.Policy.fast(keep, when="always"),
    }


def cosines(data, keep):
    """Mean cosine between the two gradients of each parameter, and the fidelity of both in the end."""
    torch.manual_seed(0)
    example = (torch.empty(64, 1, 28, 28),)
    exact_policy, fast_policy = policies(keep).values()
    exact, _ = fxprop.transform(make_cnn("conv"), exact_policy, example)
    fast = copy.deepcopy(exact)
    fxprop.set_keep(fast, fast_policy)
    optimizer = torch.optim.Adam(exact.parameters(), lr=1e-3)
    found = {name: [] for name, _ in exact.named_parameters()}
    loader = torch.utils.data.DataLoader(load(data, True), 64, shuffle=True)
    for x, y in loader:
        fast.load_state_dict(exact.state_dict())
        for module in (fast, exact):
            module.zero_grad()
            F.cross_entropy(module(x), y).backward()
        for (name, ours), theirs in zip(fast.named_parameters(), exact.parameters(), strict=True):
            # a bias in front of batch norm has no gradient
            if theirs.grad.any():
                cosine = F.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), 0)
                found[name].append(cosine.item())
        optimizer.step()
    fast.load_state_dict(exact.state_dict())
    batches = list(itertools.islice(loader, 10))
    against_dense = [fxprop.fidelity(gm, batches, loss_of) for gm in (exact, fast)]
    return {n: statistics.mean(values) if values else 1.0 for n, values in found.items()}, against_dense


def loss_of(gm, batch):
    return F.cross_entropy(gm(batch[0]), batch[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.05])
    args = parser.parse_args()
    accuracies = {}
    for keep in args.keep:
        for seed in range(args.seeds):
            for name, policy in policies(keep).items():
                of_epochs, _, _ = train(
                    args.data, epochs=args.epochs, seed=seed, norm_after="conv", quiet=True, policy=policy
                )
                accuracies.setdefault((keep, name), []).append(f"{of_epochs[-1]:.2f}")
    found = {keep: cosines(args.data, keep) for keep in args.keep}
    of_keep = {keep: means for keep, (means, _) in found.items()}
    keeps = [f"keep {keep:g}" for keep in args.keep]
    rows = [[name, *(f"{of_keep[k][name]:.3f}" for k in args.keep)] for name in of_keep[args.keep[0]]]
    print("cosine between the gradients of the fast preset and of the exact rule (l2)")
    print(tabulate(rows, ("parameter", *keeps), tablefmt="github", disable_numparse=True))
    rows = [[n, *(" / ".join(accuracies[k, n]) for k in args.keep)] for n in ("exact", "fast")]
    print(f"accuracy after {args.epochs} epochs, %, by seed")
    print(tabulate(rows, ("", *keeps), tablefmt="github", disable_numparse=True))
    for keep, (_, against_dense) in found.items():
        for name, table in zip(("exact", "fast"), against_dense, strict=True):
            print(f"\nkeep {keep:g}, {name}: {table.render('github')}")


if __name__ == "__main__":
    main()
