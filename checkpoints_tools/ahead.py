"""Makes the next item while the current one is used: reading overlaps with writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """make(item) of all items in order, each made in a thread while the caller uses the one before.

    Two results are alive at a time. An exception of make is raised where its result would come.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        current: Future[Result] | None = None
        for item in items:
            following = pool.submit(make, item)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()
