"""What is learnt in the same time: each method with a learning rate that ends when its budget is spent.

python examples/benchmarks/equal_time.py glyphs --data DIR --out glyphs.jsonl --clock cpu --threads 1 \\
  --methods dense examples-auto channel-25 element-5 --budgets 30 60 --lr 0.05 0.1 --batch 16 32 --seeds 5

Tasks: glyphs and finetune (images in MNIST's format with many classes; the latter pretrains on half of the
classes and learns the others), chars (a small GPT on the source of Python's standard library), mnist10k
(cross-validated over 10,000 images in MNIST's format), or any of torchvision's classes of labelled images,
by name (downloaded).

First each method of --tuned takes a grid of learning rates and batch sizes, compared by the loss on
validation data; the others take what is best for dense. Then come the seeds, in pairs: the same weights and
the same mini-batches for all methods that have the same batch size. Each finished run is a line of JSON in
--out, and is not run again. Training alone counts: what happens once (tracing) is kept as "setup".
"""

import argparse
import datetime
import itertools
import platform
from pathlib import Path

import torch
from learning import plan, results, tasks, train
from learning.methods import METHODS

# seeds of the grid, which no comparison uses
GRID_SEED = 1000


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", help="glyphs, finetune, chars, mnist10k, or a data set of torchvision")
    parser.add_argument("--data", default="data")
    parser.add_argument("--out", type=Path, default=Path("equal_time.jsonl"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dense", "examples-auto"])
    parser.add_argument("--tuned", nargs="+", choices=METHODS, default=["dense", "examples-auto"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[30.0], help="seconds, one or several")
    parser.add_argument("--grid-budget", type=float, help="seconds; the least of --budgets unless given")
    parser.add_argument("--grid-seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.1])
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--seeds", type=int, default=5, help="0: the grid alone")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="for several processes with an --out each"
    )
    parser.add_argument("--test", type=int, default=4000, help="test images, at most")
    parser.add_argument("--pretrain", type=float, default=60.0, help="seconds, before finetune")
    parser.add_argument("--clock", choices=train.CLOCKS, default="wall", help="cpu: fair beside other work")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--plan",
        type=int,
        nargs="+",
        metavar="STEPS",
        help="no runs: what fxprop.recommend says then",
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args(argv)
    missing = set(args.tuned) - set(args.methods)
    args.tuned = [name for name in args.tuned if name not in missing]
    return args


def load(args, seed):
    if args.task != "finetune":
        return tasks.load(args.task, args.data, seed, args.test)
    before, task = tasks.halves(args.data, args.test)
    weights = train.pretrained(before, args.pretrain, args.clock, args.out.with_suffix(".pretrained.pt"))
    return tasks.starting_from(task, weights)


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.plan:
        for text in plan.plan(load(args, 0), sorted(args.plan), args.lr[0], args.batch[0]):
            print(text, flush=True)
        return
    kept = results.Runs(args.out)
    loaded = {}

    def once(**key):
        key = {"task": args.task, "clock": args.clock, "threads": args.threads, **key}
        done = kept.find(key)
        if done is None:
            # one fold in five where the data are cross-validated
            fold = key["seed"] % 5 if args.task == "mnist10k" else 0
            if fold not in loaded:
                loaded.clear()
                loaded[fold] = load(args, fold)
            names = ("budget", "lr", "batch", "seed", "clock")
            how = {name: key[name] for name in names}
            found = train.run(loaded[fold], key["method"], **how, curve=not key["grid"], quiet=args.quiet)
            done = {**key, **found, "machine": platform.machine(), "torch": torch.__version__}
            done["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            kept.add(done)
            loss, accuracy = done.get("test") or done["validation"]
            text = {name: key[name] for name in ("method", "budget", "lr", "batch", "seed")}
            print(*text.values(), f"{done['steps']} steps, loss {loss:.4f}, {accuracy:.2f} %", flush=True)
        return done

    grid_budget = args.grid_budget or min(args.budgets)
    several = len(args.lr) * len(args.batch) > 1
    best = {}
    for name in args.tuned if several else []:
        for batch, lr, seed in itertools.product(args.batch, args.lr, range(args.grid_seeds)):
            key = {"budget": grid_budget, "lr": lr, "batch": batch, "seed": GRID_SEED + seed}
            once(method=name, **key, grid=True)
        wanted = {"task": args.task, "clock": args.clock, "threads": args.threads}
        best[name] = kept.best({**wanted, "method": name, "budget": grid_budget})
        print(f"{name}: learning rate {best[name][0]:g}, batch size {best[name][1]}", flush=True)
    usual = best.get("dense", (args.lr[0], args.batch[0]))
    chosen = []
    for budget in args.budgets:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name in args.methods:
                lr, batch = best.get(name, usual)
                key = {"method": name, "budget": budget, "lr": lr, "batch": batch, "seed": seed}
                chosen.append(once(**key, grid=False))
    if chosen:
        print(results.table(chosen))
    if chosen and args.plot:
        results.plot(chosen, args.plot)


if __name__ == "__main__":
    main()
