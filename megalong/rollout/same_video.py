"""What the prompts of one call to an engine share: the names of their media, and who computes a video first."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalong.records import MEDIA_TOKEN
from megalong.rollout.engine import Request
from megalong.rollout.transfer import MEDIA_ITEM_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaItem:
    """A run of media places of a prompt, at most MEDIA_ITEM_TOKENS long."""

    offset: int  # place in the prompt
    length: int
    row: int  # of the call's embeddings, for the first place
    positions: Tensor  # int64 [n] or [3, n], of the tokens since the item before; of the last item, to the prompt's end
    name: str  # equal for what is equal: keys and values behind equal tokens and names are


def media_items(request: Request, *, first_row: int | None, call: int) -> list[MediaItem]:
    """The request's media, [] without any.

    first_row: where its rows begin among the call's embeddings. Prompts of one call have the same names for the same
    rows at the same positions; those of another call (1, 2, ..) have other embeddings, or other weights.
    """
    items, row, told = [], first_row, 0
    runs = _media_runs(request.ids_P)
    for offset, length in runs:
        stop = offset + length
        placed = zlib.crc32(request.positions_P[..., told:stop].contiguous().numpy())
        last = len(request.ids_P) if (offset, length) == runs[-1] else stop
        items.append(
            MediaItem(
                offset=offset, length=length, row=row, positions=request.positions_P[..., told:last],
                name=f"{call}/{row}+{length}/{placed:08x}",
            )
        )  # fmt: skip
        row, told = row + length, last
    return items


def _media_runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """(offset, length) of the runs of MEDIA_TOKEN, long ones in pieces."""
    is_media = torch.tensor(ids) == MEDIA_TOKEN
    edges = torch.diff(is_media.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1).int())
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [
        (at, min(MEDIA_ITEM_TOKENS, stop - at))
        for start, stop in zip(starts, stops, strict=True)
        for at in range(start, stop, MEDIA_ITEM_TOKENS)
    ]


class Turns:
    """In which order the first responses of a call's groups are asked for.

    A response finds in the prefix cache what was computed before it was scheduled. So the first response of a group
    goes ahead, and the others follow when it has a token; sent together, they may be scheduled behind the first piece
    of a long prompt, and compute the rest once each. In the same way the first question about a video goes ahead of the
    other ones. As many groups go ahead at a time as one step computes.
    """

    def __init__(self, requests: Sequence[Request], first_rows: Sequence[int | None], *, step_tokens: int) -> None:
        """first_rows: of each request's embeddings, None without any; equal where the embeddings are the same."""
        stops = [_media_stop(request.ids_P) for request in requests]
        leaders: dict[object, int] = {}
        # Of each request, the first one with the same tokens and embeddings up to its last media place.
        self._leaders = [
            leaders.setdefault((row, request.ids_P[:stop]) if stop else index, index)
            for index, (request, row, stop) in enumerate(zip(requests, first_rows, stops, strict=True))
        ]
        self._computed = [  # tokens
            len(request.ids_P) - (stop if leader != index else 0)
            for index, (request, stop, leader) in enumerate(zip(requests, stops, self._leaders, strict=True))
        ]
        self._step_tokens = step_tokens
        # The questions about a video side by side: later, its keys and values may have made room for others'.
        self._waiting = sorted(range(len(requests)), key=self._leaders.__getitem__)
        self._ahead: set[int] = set()

    @property
    def waiting(self) -> bool:
        """Whether any group still waits."""
        return bool(self._waiting)

    def take(self) -> list[int]:
        """The groups that go ahead now: one at least, unless others are under way or none waits."""
        taken = []
        for index in self._waiting:
            if self._leaders[index] in self._ahead:
                continue  # held back
            if self._ahead and sum(self._computed[other] for other in (*self._ahead, index)) > self._step_tokens:
                break
            self._ahead.add(index)
            taken.append(index)
        self._waiting = [index for index in self._waiting if index not in self._ahead]
        return taken

    def arrived(self, index: int) -> bool:
        """The first response of a group has tokens. Whether these are its first: what waited for it may follow."""
        first = index in self._ahead
        self._ahead.discard(index)
        return first


def _media_stop(ids: Sequence[int]) -> int:
    """The place behind the last media place, 0 without any."""
    return len(ids) - ids[::-1].index(MEDIA_TOKEN) if MEDIA_TOKEN in ids else 0
