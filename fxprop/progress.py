"""Progress: which stage of a call is running, shown on a terminal when it takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

# seconds before anything is shown, and between two refreshes
_AFTER, _EVERY = 2.0, 0.2


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Say that what follows is `name`, such as "tracing"; costs nothing where no progress is shown."""
    display = _display.get()
    if display is None:
        yield
        return
    before = display.show(name)
    try:
        yield
    finally:
        display.show(before)


@contextlib.contextmanager
def show_progress(wanted: bool) -> Iterator[None]:
    """Show the stages inside, with the seconds passed, on standard error once two seconds have passed."""
    if not wanted:
        yield
        return
    display = _Display()
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)
        display.close()


class _Display:
    """One line on standard error that a thread keeps current; there is none between stages."""

    def __init__(self) -> None:
        self._begun, self._name = time.time(), ""
        self._bar: tqdm[Any] | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def show(self, name: str) -> str:
        """Another stage; returns the one before."""
        with self._lock:
            before, self._name = self._name, name
            self._refresh()
        return before

    def close(self) -> None:
        """Show nothing any more."""
        self._over.set()
        self._thread.join()
        self.show("")

    def _run(self) -> None:
        while not self._over.wait(_EVERY):
            with self._lock:
                self._refresh()

    def _refresh(self) -> None:
        if self._bar is not None and not self._name:
            # other bars may come now
            self._bar.close()
            self._bar = None
        elif self._name and time.time() - self._begun > _AFTER:
            if self._bar is None:
                bar: tqdm[Any] = tqdm(bar_format="{desc} {elapsed}", leave=False, file=sys.stderr)
                bar.start_t = self._begun
                self._bar = bar
            self._bar.set_description_str(f"fxprop: {self._name}")


_display: ContextVar[_Display | None] = ContextVar("_display", default=None)
