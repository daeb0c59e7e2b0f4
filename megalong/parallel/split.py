"""Uneven contiguous split of a count over ranks: frames of a video, samples of a batch."""

from __future__ import annotations


def shard_range(count: int, rank: int, size: int) -> tuple[int, int]:
    """Return [first, last) of `rank` when `count` items are cut into `size` contiguous shares.

    Shares differ by at most one item, the larger ones come first, and joined in rank order they are
    0..count-1. A share may be empty. Raises ValueError unless count >= 0 and 0 <= rank < size.
    """
    if count < 0:
        raise ValueError(f"count is {count}, expected 0 or more items to split")
    if not 0 <= rank < size:
        raise ValueError(f"rank is {rank} of {size} ranks, expected 0 <= rank < size")
    each, extra = divmod(count, size)
    first = rank * each + min(rank, extra)
    return first, first + each + (rank < extra)
