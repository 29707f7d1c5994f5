"""The values and sizes that a model reads: noted in a run on real tensors, given again in one on fake ones.

So a model that reads values runs on real tensors once, and its graphs are held to it without a second run.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what each operator gave, tensors by shape and dtype alone.

    >>> with Answers() as answers:
    ...     positive = real[real > 0]
    >>> with FakeTensorMode() as mode, Answering(answers):
    ...     fake[fake > 0].shape == positive.shape
    True
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: defaultdict[Any, list[Any]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.of[func].append(_without_data(result))
        return result


class Answering(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers for fake tensors what those cannot: the n-th call of an operator gives what was noted."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of = {function: deque(results) for function, results in answers.of.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        left = self._of.get(func)
        noted = left.popleft() if left else None
        try:
            return func(*args, **(kwargs or {}))
        except Exception:  # values, sizes that depend on them, operators without a rule for fake tensors
            if noted is None:
                raise
            return _made(noted)


class _Noted(NamedTuple):
    """What is noted of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _without_data(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [*map(_without_data, value)]
    if isinstance(value, torch.Tensor):
        return _Noted(tuple(value.shape), value.dtype, value.device)
    return value


def _made(value: Any) -> Any:
    if isinstance(value, _Noted):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return [*map(_made, value)] if isinstance(value, list) else value
