"""Ctrl-C and SIGTERM: at once while nothing is written, between two tensors while a folder is built."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


@contextmanager
def handled_by(handler: _Handler) -> Iterator[None]:
    """Both signals go to `handler` inside. Outside the main thread, which alone gets signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Signals do nothing inside but make the next call of what is yielded raise KeyboardInterrupt.

    An exception in the middle of anything, a C++ writer that calls Python or the removal of a folder, could leave half
    of it behind.
    """
    asked: list[int] = []

    def stop_if_asked() -> None:
        if asked:
            raise KeyboardInterrupt

    with handled_by(lambda number, _: asked.append(number)):
        yield stop_if_asked
