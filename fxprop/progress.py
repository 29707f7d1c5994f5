"""Progress: which stage of a call is running, shown on a terminal when it takes long."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

Item = TypeVar("Item")

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
    bars = _bars() if wanted else None
    if bars is None:
        yield
        return
    display = _Display(bars)
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)
        display.close()


def count(items: Collection[Item], name: str, wanted: bool, unit: str = "it") -> Iterator[Item]:
    """The items, with a bar on standard error that counts them where it is wanted."""
    bars = _bars() if wanted else None
    yield from items if bars is None else bars(items, name, unit=unit, leave=False)


@contextlib.contextmanager
def counting(name: str, wanted: bool, total: int | None = None) -> Iterator[Callable[[], object]]:
    """What to call after each step: a bar on standard error counts them where it is wanted."""
    bars = _bars() if wanted else None
    if bars is None:
        yield lambda: None
        return
    with bars(desc=name, total=total, leave=False) as bar:
        yield bar.update


def _bars() -> Any:
    """tqdm's class; None where it is not installed, which is said once."""
    try:
        from tqdm import tqdm
    except ImportError:
        _say_missing()
        return None
    return tqdm


@functools.cache
def _say_missing() -> None:
    print("fxprop: progress is not shown: pip install tqdm", file=sys.stderr)


class _Display:
    """One line on standard error that a thread keeps current; there is none between stages."""

    def __init__(self, bars: Any) -> None:
        self._begun, self._name = time.time(), ""
        self._bars = bars
        self._bar: Any = None
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
                bar = self._bars(bar_format="{desc} {elapsed}", leave=False, file=sys.stderr)
                bar.start_t = self._begun
                self._bar = bar
            self._bar.set_description_str(f"fxprop: {self._name}")


_display: ContextVar[_Display | None] = ContextVar("_display", default=None)
