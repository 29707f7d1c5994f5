"""Which code runs while a model does."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from typing import Any

from fxprop.tracing.observe.account import Account
from fxprop.tracing.observe.watch import Watch


class Calls:
    """Sees which of `codes` run, for as long as the context lasts."""

    def __init__(self, codes: frozenset[types.CodeType]) -> None:
        self._codes = codes
        self.ran: set[types.CodeType] = set()

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        self.look(True)

    def __exit__(self, *error: object) -> None:
        if self._codes:
            # that of cProfile is none that Python's own setprofile takes
            sys.setprofile(self._before if callable(self._before) else None)

    def look(self, on: bool) -> None:
        """Look on, or not for a while: a profile function costs time for every call of any code."""
        if self._codes:
            sys.setprofile(self._note_call if on else None)

    def _note_call(self, frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in self._codes:
            self.ran.add(frame.f_code)


class AccountBesideCalls(Account):  # type: ignore[no-untyped-call]
    """An account in whose operators nobody looks for calls: below them is no code but torch's."""

    def __init__(self, watch: Watch, state: Mapping[int, str], calls: Calls) -> None:
        super().__init__(watch, state)
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace != "aten":
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._calls.look(False)
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._calls.look(True)
