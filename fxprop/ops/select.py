"""Which part of grad_output is kept: scores and top-k.

Takes grad_output and returns integer indices. Nothing here is differentiated, and nothing here
synchronises with the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed

from fxprop import settings
from fxprop.errors import OpError, PolicyError
from fxprop.plan import Sparsity
from fxprop.settings import BiasGrad, KeepArgs, NormGrad, Select, WeightGrad

# (grad_output, dims to reduce) -> one score per remaining position; higher is kept
Score = Callable[[Tensor, tuple[int, ...]], Tensor]

_HALF = (torch.float16, torch.bfloat16)


class Keep(NamedTuple):
    """The sparsity of one call: constants that travel beside the tensors."""

    k: int
    select: Select = "channel"
    score: str = "l1"
    bias_grad: BiasGrad = "full"
    sync_selection: bool = False
    score_fraction: float = 1.0
    norm_grad: NormGrad = "full"
    weight_grad: WeightGrad = "dense"
    chained: bool = False

    @classmethod
    def given(cls, op: str, keep: KeepArgs, without: tuple[str, ...] = ("norm_grad",)) -> Keep:
        """What a call of `op` says; TypeError, as of any function, for keywords that it does not have."""
        for name in keep:
            if name in without or name not in cls._fields:
                raise TypeError(f"{op}() got an unexpected keyword argument {name!r}")
        if "k" not in keep:
            raise TypeError(f"{op}() missing 1 required keyword-only argument: 'k'")
        # by position, as torch.compile wants it
        others: list[Any] = [keep.get(name, default) for name, default in _DEFAULTS.items()]
        return cls(keep["k"], *others)

    @classmethod
    def of(cls, sparsity: Sparsity) -> Keep:
        """What a plan says of one site."""
        chained = sparsity.chain is not None
        return cls(sparsity.k, **dict(settings.keywords(sparsity)), chained=chained)

    def arguments(self, takes_bias: bool = True, takes_norm: bool = False) -> dict[str, Any]:
        """As keywords of a call, without the defaults that generated code leaves out."""
        taken = {"bias_grad": takes_bias, "norm_grad": takes_norm}
        return {
            name: value
            for name, value in self._asdict().items()
            if taken.get(name, True) and (name in _ALWAYS or value != _DEFAULTS[name])
        }


_ALWAYS = ("k", "select", "score")
_DEFAULTS: dict[str, Any] = {name: Keep._field_defaults[name] for name in Keep._fields[1:]}

# entries that stay in a core's cache between two passes over them
_CACHED = 2**18


def _l1(grad_output: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _norm(grad_output, dims, 1)


def _l2(grad_output: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _norm(grad_output, dims, 2)


def _norm(grad_output: Tensor, dims: tuple[int, ...], order: Literal[1, 2]) -> Tensor:
    """The norm over `dims` (0 among them), accumulated in float32 for half types."""
    dtype = torch.float32 if grad_output.dtype in _HALF else grad_output.dtype
    if grad_output.device.type != "cpu" or torch.compiler.is_compiling():
        norms: Tensor = torch.linalg.vector_norm(grad_output, order, dims, dtype=dtype)
        return norms
    # vector_norm is 2 to 15 times slower on the CPU than sums of magnitudes that stay in the cache
    rows = max(1, _CACHED * len(grad_output) // max(1, grad_output.numel()))
    sums = [_powers(chunk, order, dtype).sum(dims) for chunk in torch.split(grad_output, rows)]
    total = torch.stack(sums).sum(0)
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

_SCORES: dict[str, Score] = {"l1": _l1, "l2": _l2, RANDOM: _random}


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
    """The scores over `dims`; NaN where a channel has an entry that is not finite and the score hides it.

    So such a channel is among the kept, and a GradScaler sees it in the gradients; but "random" reads none
    of grad_output. `keep.score_fraction` of the first of `dims` is looked at, from its beginning: with less
    than all of it, the scores, and what they see of entries that are not finite, are those of a part of the
    batch. With `keep.sync_selection` they are summed over all processes (the squares of l2).
    """
    grad_output = part_of(grad_output, keep.score_fraction, dims[0])
    scores = get_score(keep.score)(grad_output, dims)
    if _hides_nonfinite(keep):
        scores = scores + 0 * _l1(grad_output, dims)
    if not keep.sync_selection:
        return scores
    return summed_over_processes(scores.square() if keep.score == "l2" else scores)


def _hides_nonfinite(keep: Keep) -> bool:
    """Whether the score reads the entries, but may be finite where they are not."""
    return keep.score not in (*_SEE_NONFINITE, RANDOM)


def wide(tensor: Tensor) -> Tensor:
    """float32 in place of the half types, in which sums are too coarse."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def part_of(tensor: Tensor, fraction: float, dim: int = 0) -> Tensor:
    """The first `fraction` of `tensor` along `dim`, rounded up."""
    return tensor if fraction == 1 else tensor.narrow(dim, 0, math.ceil(fraction * tensor.shape[dim]))


def summed_over_processes(scores: Tensor) -> Tensor:
    """`scores` as all processes of the default group have them together; alone, as they are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return scores
    scores = scores.contiguous()
    distributed.all_reduce(scores)
    return scores


def select_channels(grad_output: Tensor, channel_dim: int, groups: int, keep: Keep) -> Tensor:
    """Indices of the kept output channels, int64 [k * groups], group after group.

    `channel_dim` is non-negative. The same number k is kept in each of `groups` equal runs of channels
    (1706.06197, section 3.3 "unified" for groups = 1). Ties are broken as torch.topk breaks them.
    """
    dims = tuple(d for d in range(grad_output.dim()) if d != channel_dim)
    scores = channel_scores(grad_output, dims, keep)
    return top_channels(scores, groups, keep.k)


def top_channels(scores: Tensor, groups: int, k: int) -> Tensor:
    """Indices of the k highest scores in each of `groups` equal runs, int64 [k * groups]."""
    if groups == 1:
        return scores.topk(k).indices
    per_group = scores.numel() // groups
    kept = scores.view(groups, per_group).topk(k, dim=1).indices
    offsets = torch.arange(0, scores.numel(), per_group, device=kept.device)
    return (kept + offsets[:, None]).flatten()


def take_features(rows: Tensor, kept: Tensor) -> Tensor:
    """The kept columns of [rows, features]."""
    if rows.device.type != "cpu":
        return rows.index_select(1, kept)
    # 1.5 to 2 times as fast as index_select on the CPU
    return rows.gather(1, kept.expand(len(rows), -1))


def is_channels_last(tensor: Tensor) -> bool:
    """Whether [N, C, *spatial] lies in memory as [N, *spatial, C]."""
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def take_channels(grad_output: Tensor, kept: Tensor) -> Tensor:
    """The kept channels of [N, C, *spatial], in its memory format.

    index_select would gather across strides, and give a contiguous tensor: 23 ms in place of 0.6 for 26 of
    256 channels of 8 x 56 x 56.
    """
    if not is_channels_last(grad_output):
        return grad_output.index_select(1, kept)
    rows = grad_output.movedim(1, -1)
    taken = take_features(rows.reshape(-1, rows.shape[-1]), kept)
    return taken.view(*rows.shape[:-1], len(kept)).movedim(-1, 1)


def mask_elements(grad_output: Tensor, keep: Keep) -> Tensor:
    """`grad_output` [examples, n] with all but the top-k entries of each row set to zero.

    meProp's top-k per example (1706.06197, equation 5). k is capped at n: a smaller image than the one
    the plan was made for has fewer entries. An entry that is not finite ranks highest, but by "random".
    """
    if keep.score in _SEE_NONFINITE:
        scores = grad_output.abs()  # of one entry both norms are its magnitude
    else:
        # a dimension to reduce: torch's reductions over none of them reduce all
        scores = get_score(keep.score)(grad_output.unsqueeze(-1), (grad_output.dim(),))
    if _hides_nonfinite(keep):
        scores = scores + 0 * grad_output
    kept = scores.topk(min(keep.k, scores.shape[1]), dim=1, sorted=False).indices
    return torch.zeros_like(grad_output).scatter_(1, kept, grad_output.gather(1, kept))
