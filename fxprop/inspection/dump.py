"""Everything about a rewrite as files in a folder: what people attach to bug reports."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from fxprop.errors import ExamplesError, ReportError
from fxprop.inspection.code import backward_code, code_diff, generated_code, op_counts
from fxprop.inspection.decided_policy import make_decided_policy
from fxprop.pipeline.recipe import recipe_of
from fxprop.policy.files import to_toml
from fxprop.progress import stage
from fxprop.version import __version__

_ABOUT = {
    "index.md": "this list, the totals, and the operations before and after",
    "code_before.py": "the generated code before the rewrite",
    "code_after.py": "the generated code after it",
    "code.diff": "what changed, one hunk per layer; `patch code_before.py code.diff` gives `code_after.py`",
    "backward.py": "the backward on part of the mini-batch, in two parts, or why there is none",
    "report.html": "the report as a page for a browser",
    "report.txt": "the report as text, every layer",
    "report.md": "the same as Markdown",
    "report.json": "every number exactly",
    "report.csv": "one line per layer",
    "policy.toml": "the policy in force",
    "policy_resolved.toml": "the same layer by layer: what rules, cost model and timings decided",
    "environment.txt": "versions and machine, by torch.utils.collect_env",
}
_PACKAGES = ("fxprop", "torch", "torchvision", "timm", "transformers", "tabulate", "jinja2")


def dump(gm: nn.Module, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write everything about a rewrite to `folder`, index.md first; returns the files.

    >>> gm, _ = fxprop.transform(model, 0.05, (x,))
    >>> fxprop.dump(gm, "for_the_bug_report")

    Code before and after, their diff, the report in all its forms, the policy as it was given and as it was
    resolved layer by layer, and the environment. For the mode (train or eval) that `gm` is in. The folder
    is created if needed; files of these names in it are replaced, others stay. Parameters are not
    written. Raises ReportError if it cannot be written, ModelError for a module that does not come from
    `fxprop.transform`.
    """
    texts = _texts(gm)
    where = Path(folder)
    try:
        where.mkdir(parents=True, exist_ok=True)
        for name in _ABOUT:
            (where / name).write_text(texts[name], encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write to {where}: {error.strerror}") from error
    return tuple(where / name for name in _ABOUT)


def _texts(gm: nn.Module) -> Mapping[str, str]:
    recipe = recipe_of(gm)
    report = recipe.report(gm.training)
    before, after, diff = generated_code(gm, before=True), generated_code(gm), code_diff(gm)
    with stage("describing the environment"):
        environment = _environment()
    counts = [(op, *of_op) for op, of_op in op_counts(gm).items()]
    files = [(f"[{name}]({name})", about) for name, about in _ABOUT.items()]
    index = [
        f"# {report.model}, rewritten by fxprop {__version__}",
        tabulate(files, ("file", "what it is"), tablefmt="github"),
        "## Backward FLOPs",
        report.to_markdown(depth=1).rstrip(),
        "## Operations in the graphs",
        tabulate(counts, ("operation", "before", "after"), tablefmt="github"),
        "## To make the same rewrite again",
        "`fxprop report MODEL --policy policy_resolved.toml`, or "
        '`fxprop.transform(model, "policy_resolved.toml", example_inputs)`.',
    ]
    return {
        "index.md": "\n\n".join(index) + "\n",
        "code_before.py": before + "\n",
        "code_after.py": after + "\n",
        "code.diff": diff,
        "backward.py": _backward(gm),
        "report.html": report.to_html(diff, recipe.backward),
        "report.txt": report.to_text(width=160, depth="all"),
        "report.md": report.to_markdown(),
        "report.json": report.to_json(),
        "report.csv": report.to_csv(),
        "policy.toml": to_toml(recipe.writable_policy),
        "policy_resolved.toml": to_toml(make_decided_policy(recipe)),
        "environment.txt": environment,
    }


def _backward(gm: nn.Module) -> str:
    try:
        return backward_code(gm)
    except ExamplesError as reason:
        return f"# {reason}\n"


def _environment() -> str:
    # slow to import, and only needed here
    from torch.utils import collect_env

    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    threads = f"torch threads {torch.get_num_threads()}"
    machine = collect_env.get_pretty_env_info()  # type: ignore[no-untyped-call]
    return "\n".join([*versions, threads, "", machine, ""])
