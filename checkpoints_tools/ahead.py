"""Makes the next items while the current one is used: reading overlaps with writing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""While one thread waits for the disk, the other copies what it got."""


def ahead(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """make(item) of all items in order, made in threads while the caller uses the ones before.

    AHEAD results are alive beside the caller's. An exception of make is raised where its result would come; what comes
    behind it is not made, unless it has been begun.
    """
    rest = iter(items)
    with ThreadPoolExecutor(max_workers=AHEAD) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(make, item) for item in islice(rest, AHEAD))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(make, item) for item in islice(rest, 1))
                yield result
                del result  # before the next one, which may have been made by now, takes its place
        finally:
            pool.shutdown(cancel_futures=True)
