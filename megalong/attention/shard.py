"""Stage 2: a rank's share of a pack, as token rows, as embeddings that go into them, and as response rows it scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalong.attention.context import PADDING, deal_rows, places_of, response_share, shard_pack
from megalong.attention.core import encode_mask
from megalong.attention.last_layer import predicting_rows
from megalong.parallel.exchange import ExchangePlan, exchange_rows, plan_exchange
from megalong.parallel.layout import ContextGroups
from megalong.records import MEDIA_TOKEN, TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class PackShard:
    """What one context-parallel rank computes of a pack. t: its rows, padding included; all tensors on the CPU.

    With sequence parallelism a tensor-parallel rank embeds one of tp equal slices of them, s rows, otherwise all.
    """

    text_M: Tensor  # [M] int64 token ids of the text among the t rows, in order
    num_media: int  # n: vision embeddings in the s rows
    source_s: Tensor  # [s] int64: k < n takes vision embedding k of the n, n + j text embedding j, -1 is padding
    positions_t: Tensor  # [t] or [3, t] int64
    mask: Tensor  # attention.core.encode_mask
    rows_R: Tensor  # [R] int64: the last layer's row that predicts each response token; PADDING: another rank's
    exchange: ExchangePlan | None  # those rows to the ranks that score them; None: this rank scores all of them
    shares: tuple[tuple[int, int], ...]  # [first, last) of the pack's R response rows that each rank scores
    context: ContextGroups

    @property
    def share(self) -> slice:
        """This rank's of the pack's response rows."""
        return slice(*self.shares[self.context.rank])

    def response_rows(self, hidden_nD: Tensor) -> Tensor:
        """[n, D] final hidden states (attention.last_layer's rows) -> [r, D] of the response rows this rank scores."""
        if self.exchange is None:
            return hidden_nD[self.rows_R.to(hidden_nD.device)]
        return exchange_rows(hidden_nD, self.exchange, group=self.context.group)


def media_of_parts(tokens: TokenBatch, context: ContextGroups, *, parts: int) -> list[list[Tensor]]:
    """Which of the pack's vision embeddings go into each of `parts` equal slices of every context-parallel rank's rows.

    By rank, then by slice: [n] int64 each, in order.
    """
    media_T = tokens.ids_T == MEDIA_TOKEN
    ordinal_T = media_T.cumsum(0) - 1
    shards = shard_pack(tokens.segments, context, multiple=parts)
    return [[ordinal_T[rows[(rows != PADDING) & media_T[rows]]] for rows in shard.chunk(parts)] for shard in shards]


def shard_tokens(tokens: TokenBatch, context: ContextGroups, *, part: tuple[int, int]) -> PackShard:
    """The share of this rank of `context`; ContextGroups().alone gives the whole pack.

    part: (which, of how many) equal slices of the rows this rank embeds, PackGpt.sequence_part.
    """
    which, multiple = part
    rows_t = shard_pack(tokens.segments, context, multiple=multiple)[context.rank]
    place_t = rows_t.clamp_min(0)
    media_T = tokens.ids_T == MEDIA_TOKEN
    is_media_t, is_text_t = media_T[place_t] & (rows_t != PADDING), ~media_T[place_t] & (rows_t != PADDING)
    slices = (whole_t.chunk(multiple)[which] for whole_t in (is_media_t, is_text_t, is_text_t.cumsum(0) - 1))
    is_media_s, is_text_s, text_row_s = slices
    num_media = int(is_media_s.sum())
    source_s = torch.full_like(text_row_s, PADDING)
    source_s[is_media_s] = torch.arange(num_media)
    source_s[is_text_s] = num_media + text_row_s[is_text_s]
    exchange = None
    shares = response_share(len(tokens.rows_R), context)
    needed_U = predicting_rows(tokens)
    owner_T, local_T = places_of(deal_rows(needed_U, context, multiple=multiple), len(tokens.ids_T))
    if context.size > 1:
        wanted = [tokens.rows_R[first:last] for first, last in shares]
        exchange = plan_exchange(owner_T, local_T, wanted, rank=context.rank)
    return PackShard(
        text_M=tokens.ids_T[place_t[is_text_t]],
        num_media=num_media,
        source_s=source_s,
        positions_t=tokens.positions_T[..., place_t],
        mask=encode_mask(tokens.segments, sharded=context.size > 1, needed_U=needed_U, multiple=multiple),
        rows_R=local_T[tokens.rows_R],
        exchange=exchange,
        shares=tuple(shares),
        context=context,
    )
