"""What top-k ranks by: a score for each channel, row or entry of grad_output, by name.

Nothing here is differentiated, and nothing here synchronises with the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, distributed

from fxprop.errors import OpError, PolicyError
from fxprop.ops.compiling import is_compiling
from fxprop.ops.keep import Keep

# (grad_output, dims to reduce) -> one score per remaining position; higher is kept
Score = Callable[[Tensor, tuple[int, ...]], Tensor]

_HALF = (torch.float16, torch.bfloat16)

# entries that stay in a core's cache between two passes over them
_CACHED = 2**18


def _l1(grad_output: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _norm(grad_output, dims, 1)


def l2_norms(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Norms over `dims`, in float32 for half types."""
    return _norm(tensor, dims, 2)


def _norm(grad_output: Tensor, dims: tuple[int, ...], order: Literal[1, 2]) -> Tensor:
    """The norm over `dims`, accumulated in float32 for half types."""
    dtype = torch.float32 if grad_output.dtype in _HALF else grad_output.dtype
    if grad_output.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(grad_output, order, dims, dtype=dtype)
        return norms
    # vector_norm is 2 to 15 times slower on the CPU than sums of magnitudes that stay in the cache
    if is_compiling():
        whole = _powers(grad_output, order, dtype).sum(dims)
        return whole if order == 1 else whole.sqrt()
    rows = max(1, _CACHED * len(grad_output) // max(1, grad_output.numel()))
    sums = [_powers(chunk, order, dtype).sum(dims) for chunk in torch.split(grad_output, rows)]
    total = torch.stack(sums).sum(0) if 0 in dims else torch.cat(sums)
    return total if order == 1 else total.sqrt()


def _powers(grad_output: Tensor, order: Literal[1, 2], dtype: torch.dtype) -> Tensor:
    return grad_output.to(dtype).abs() if order == 1 else grad_output.to(dtype).square()


def _random(grad_output: Tensor, dims: tuple[int, ...]) -> Tensor:
    kept = [size for dim, size in enumerate(grad_output.shape) if dim not in dims]
    return torch.rand(kept, device=grad_output.device)


# scores that are not finite where grad_output is not; topk takes NaN for the largest
_SEE_NONFINITE = ("l1", "l2")
# the score that looks at nothing, and so sees nothing
RANDOM = "random"
# scores that follow from sums over grad_output, before any entry of the gradient behind a norm exists
FROM_SUMS = ("l1", "l2", RANDOM)

_SCORES: dict[str, Score] = {"l1": _l1, "l2": l2_norms, RANDOM: _random}


def score_names() -> tuple[str, ...]:
    """The names a policy may use for `score`."""
    return tuple(_SCORES)


def register_score(name: str, score: Score) -> None:
    """Make `score` available to policies under `name`.

    >>> fxprop.ops.register_score("linf", lambda g, dims: g.abs().amax(dims))

    `score` takes grad_output and the dims to reduce, which are non-negative: all but the channel's. It
    returns one real number per remaining position, of which the highest k are kept. Where single elements
    are chosen, grad_output comes with one more dimension, of size 1, and that one is reduced. Raises
    PolicyError if the name is taken.
    """
    if name in _SCORES:
        raise PolicyError(
            f"score {name!r} is already registered; choose another name (taken: {', '.join(_SCORES)})"
        )
    _SCORES[name] = score


def get_score(name: str) -> Score:
    """The score function registered under `name`; OpError names the known ones."""
    try:
        return _SCORES[name]
    except KeyError:
        raise OpError(
            f"unknown score {name!r}: expected one of {', '.join(_SCORES)}; "
            "add your own with fxprop.ops.register_score"
        ) from None


def channel_scores(grad_output: Tensor, dims: tuple[int, ...], keep: Keep) -> Tensor:
    """The scores over `dims`, as `scores_over` has them, of one part of the batch, or of all processes.

    `keep.score_fraction` of the first of `dims` is looked at, from its beginning: with less than all of it,
    the scores, and what they see of entries that are not finite, are those of a part of the batch. With
    `keep.sync_selection` they are summed over all processes (the squares of l2).
    """
    scores = scores_over(part_of(grad_output, keep.score_fraction, dims[0]), dims, keep)
    if not keep.sync_selection:
        return scores
    return sum_over_processes(scores.square() if keep.score == "l2" else scores)


def scores_over(grad_output: Tensor, dims: tuple[int, ...], keep: Keep) -> Tensor:
    """The scores over `dims`; NaN where there is an entry that is not finite and the score hides it.

    So what has such an entry is among the kept, and a GradScaler sees it in the gradients; but "random"
    reads none of grad_output.
    """
    scores = get_score(keep.score)(grad_output, dims)
    hides_nonfinite = keep.score not in (*_SEE_NONFINITE, RANDOM)
    return scores + 0 * _l1(grad_output, dims) if hides_nonfinite else scores


def is_magnitude(keep: Keep) -> bool:
    """Whether the score of a single entry is its magnitude, as both norms are."""
    return keep.score in _SEE_NONFINITE


def entry_scores(grad_output: Tensor, keep: Keep) -> Tensor:
    """As `scores_over`, for each entry alone."""
    if is_magnitude(keep):
        return grad_output.abs()
    # a dimension to reduce: torch's reductions over none of them reduce all
    return scores_over(grad_output.unsqueeze(-1), (grad_output.dim(),), keep)


def wide(tensor: Tensor) -> Tensor:
    """float32 in place of the half types, in which sums are too coarse."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def count_of(fraction: float, n: int) -> int:
    """How many of n rows a `score_fraction` is: rounded up."""
    return math.ceil(fraction * n)


def part_of(tensor: Tensor, fraction: float, dim: int = 0) -> Tensor:
    """The first `fraction` of `tensor` along `dim`, rounded up."""
    return tensor if fraction == 1 else tensor.narrow(dim, 0, count_of(fraction, tensor.shape[dim]))


def sum_over_processes(scores: Tensor) -> Tensor:
    """`scores` as all processes of the default group have them together; alone, as they are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return scores
    scores = scores.contiguous()
    distributed.all_reduce(scores)
    return scores
