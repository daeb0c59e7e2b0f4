"""Videos under way: read or decoded on threads, each with the memory that it will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Fetches(Generic[Item]):
    """Items that threads of `pool` make, by key, until they are taken."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._running: dict[str, tuple[Future[Item], int]] = {}
        self._spans: deque[tuple[float, float]] = deque()

    def __contains__(self, key: str) -> bool:
        return key in self._running

    @property
    def num_bytes(self) -> int:
        """Of all that was started and not taken, finished or not."""
        return sum(num_bytes for _, num_bytes in self._running.values())

    def start(self, key: str, make: Callable[[], Item], *, num_bytes: int) -> None:
        """num_bytes: of what `make` returns."""

        def timed() -> Item:
            started = time.perf_counter()
            try:
                return make()
            finally:
                self._spans.append((started, time.perf_counter()))

        self._running[key] = self._pool.submit(timed), num_bytes

    def take(self, key: str) -> Item:
        """Wait for it and forget it. Raises what its making raised."""
        future, _ = self._running.pop(key)
        return future.result()

    def drop_others(self, keys: Container[str]) -> None:
        """Wait for what is not among the keys, and let go of it: their memory is free then."""
        for key in [key for key in self._running if key not in keys]:
            future, _ = self._running.pop(key)
            if not future.cancel():
                future.exception()

    def clear(self) -> None:
        """Nobody will take what is under way."""
        self._running.clear()

    def take_spans(self) -> list[tuple[float, float]]:
        """Begin and end, by time.perf_counter(), of what has finished since the last call."""
        return [self._spans.popleft() for _ in range(len(self._spans))]
