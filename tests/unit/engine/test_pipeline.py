"""Which embeddings each rank of a replica asks for, and where in its rows they and the text go."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from megalong_kernels.sequence_shard import shard_rows
from torch import Tensor

from megalong.attention.context import PADDING, shard_pack
from megalong.attention.shard import PackShard
from megalong.engine import pipeline
from megalong.engine.pipeline import PackRunner
from megalong.parallel.layout import ContextGroups
from megalong.records import MEDIA_TOKEN, Segment, TokenBatch

TP = CP = 2
VIDEO, TEXT = 1000, 100
"""What an embedding's number and a token's id are raised by where they are placed; a padding row is 0."""
PACKS = [[0, -1, -1, -1, 1, -1, -1, 2, 3, 4, 5], [6, 7, -1], [-1, -1]]
"""Token ids: text between vision tokens, slices of padding alone. Unsharded, one rank has nothing of the last one."""


def batch(ids: list[int]) -> TokenBatch:
    return TokenBatch(
        ids_T=torch.tensor(ids),
        positions_T=torch.arange(len(ids)),
        segments=(Segment(start=0, length=len(ids), parent=-1),),
        selections=("a video",) * (MEDIA_TOKEN in ids),
        rows_R=torch.tensor([0]),
        targets_R=torch.tensor([0]),
        response_R=torch.tensor([0]),
    )


class Rank:
    """The runner of one rank, with an embedding's number in its place; keeps what it asked for and what it embeds."""

    def __init__(self, rank: int, *, parts: int, sharded: bool) -> None:
        places = [(tp, cp, 0) for cp in range(CP) for tp in range(TP)]
        self.rank, (self.tp, self.cp, _) = rank, places[rank]
        self.context = ContextGroups(size=CP, rank=self.cp, ring_size=CP, ring_rank=self.cp)
        self.part = (self.tp if parts > 1 else 0, parts)
        self.module = SimpleNamespace(llm=SimpleNamespace(sequence_part=self.part))
        self.asked: list[tuple[list[list[int]], list[bool]]] = []
        self.rows: list[list[int]] = []
        layout = SimpleNamespace(pp_size=1, replica_size=len(places), places=places, context=self.context)
        runner = PackRunner(ddp=self, layout=layout, embeddings=self.embeddings, sharded=sharded)
        runner.run([batch(ids) for ids in PACKS], lambda *_: (torch.zeros(()), {}), backward=False)

    def embeddings(self, _: object, wanted: Sequence[Tensor], *, returns: Sequence[bool]) -> Tensor:
        self.asked.append(([rows.tolist() for rows in wanted], list(returns)))
        return VIDEO + wanted[self.rank][:, None]

    def __call__(self, shard: PackShard, embeds_n1: Tensor) -> Tensor:
        text_M1 = TEXT + shard.text_M[:, None]
        assert shard.num_media == len(embeds_n1)
        self.rows.append(shard_rows(embeds_n1, text_M1, shard.source_s)[:, 0].tolist())
        return torch.zeros(())

    def expected(self, ids: list[int], context: ContextGroups, first: int) -> list[int]:
        """The slice of a pack that is this rank's; first: number of its first embedding."""
        numbers = iter(range(VIDEO + first, VIDEO + first + len(ids)))
        values = [next(numbers) if token == MEDIA_TOKEN else TEXT + token for token in ids]
        shard = shard_pack(batch(ids).segments, context, multiple=self.part[1])[context.rank]
        rows = shard.chunk(self.part[1])[self.part[0]].tolist()
        return [0 if row == PADDING else values[row] for row in rows]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("parts", [1, TP])
def test_the_ranks_of_a_replica_have_each_embedding_once(
    parts: int, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """parts=1: without sequence parallelism tensor-parallel ranks have the same rows, and one returns gradients."""
    monkeypatch.setattr(pipeline, "gather_objects", lambda *_, **__: [{index: {} for index in range(len(PACKS))}])
    ranks = [Rank(rank, parts=parts, sharded=sharded) for rank in range(TP * CP)]
    # Embeddings of a turn, and number of the first one of each pack.
    counts, first = ([5, 1, 2], [0, 0, 0]) if sharded else ([6, 2], [0, 5, 0])
    for rank in ranks:
        mine = range(len(PACKS)) if sharded else range(rank.cp, len(PACKS), CP)
        context = rank.context if sharded else rank.context.alone
        assert rank.rows == [rank.expected(PACKS[index], context, first=first[index]) for index in mine]
        assert rank.asked == ranks[0].asked
    for (wanted, returns), count in zip(ranks[0].asked, counts, strict=True):
        assert returns == ([True] * 4 if parts > 1 else [True, False, True, False])
        assert wanted[0] == wanted[1] or parts > 1
        kept = [number for numbers, back in zip(wanted, returns, strict=True) if back for number in numbers]
        assert sorted(kept) == list(range(count))
