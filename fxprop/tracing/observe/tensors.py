"""What operators do to the tensors that they are given, seen below autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# not a public path, but the one torch's own documentation imports it from
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an operator's arguments or results, which nest lists at most."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def storage_of(tensor: Tensor) -> int:
    """What all views of the same memory have in common, for as long as one of them lives."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return id(tensor)
    # private, but data_ptr() is 0 for all tensors without data
    return int(tensor.untyped_storage()._cdata)


def is_random(function: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in function.tags


def written_by(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operator changes in place."""
    schema = function._schema
    if not schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
    return [
        tensor
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(given.get(argument.name))
    ]


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows which tensors were made since it began. What is written to others is undone when it ends.

    >>> with Made():
    ...     weight.data.mul_(2)      # as before, afterwards
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # storages
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)  # a question, such as for the device
        written = [t for t in written_by(func, args, kwargs) if storage_of(t) not in self._made]
        for tensor in written:
            self._save(tensor)
        given = {storage_of(t) for t in tensors_in((*args, *kwargs.values()))}
        result = self.called(func, args, kwargs, written)
        for tensor in tensors_in(result):
            if storage_of(tensor) not in given:
                self._made.add(storage_of(tensor))
        return result

    def called(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], written: list[Tensor]
    ) -> Any:
        """The result of an operator that changes `written`, which were there before."""
        return function(*args, **kwargs)

    def _save(self, tensor: Tensor) -> None:
        has_data = not (tensor.is_meta or isinstance(tensor, FakeTensor))
        if has_data and storage_of(tensor) not in self._before:
            self._before[storage_of(tensor)] = tensor, tensor.detach().clone()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for tensor, before in self._before.values():
                tensor.detach().copy_(before)
        self._before.clear()
        self._made.clear()
