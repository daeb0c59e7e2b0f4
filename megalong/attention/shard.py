"""Stage 2: a rank's share of a pack, as token rows, as vision embeddings it needs, and as response rows it scores."""

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
    """What one context-parallel rank computes of a pack. t: its rows, padding included; all tensors on the CPU."""

    text_M: Tensor  # [M] int64 token ids of its text rows, in order
    source_t: Tensor  # [t] int64: k < n takes vision embedding k of its n, n + j text embedding j, -1 is padding
    positions_t: Tensor  # [t] or [3, t] int64
    mask: Tensor  # attention.core.encode_mask
    media: tuple[Tensor, ...]  # for every context-parallel rank: which of the pack's vision embeddings it needs, [n]
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


def shard_tokens(tokens: TokenBatch, context: ContextGroups, *, multiple: int) -> PackShard:
    """The share of this rank of `context`; ContextGroups().alone gives the whole pack.

    multiple: the number of rows must be divisible by it (tensor-parallel size under sequence parallelism).
    """
    shards = shard_pack(tokens.segments, context, multiple=multiple)
    rows_t = shards[context.rank]
    place_t = rows_t.clamp_min(0)
    media_T = tokens.ids_T == MEDIA_TOKEN
    ordinal_T = media_T.cumsum(0) - 1
    real = [rows[rows != PADDING] for rows in shards]
    is_media_t, is_text_t = media_T[place_t] & (rows_t != PADDING), ~media_T[place_t] & (rows_t != PADDING)
    source_t = torch.full_like(rows_t, PADDING)
    num_media, num_text = int(is_media_t.sum()), int(is_text_t.sum())
    source_t[is_media_t] = torch.arange(num_media)
    source_t[is_text_t] = num_media + torch.arange(num_text)
    exchange = None
    shares = response_share(len(tokens.rows_R), context)
    needed_U = predicting_rows(tokens)
    owner_T, local_T = places_of(deal_rows(needed_U, context, multiple=multiple), len(tokens.ids_T))
    if context.size > 1:
        wanted = [tokens.rows_R[first:last] for first, last in shares]
        exchange = plan_exchange(owner_T, local_T, wanted, rank=context.rank)
    return PackShard(
        text_M=tokens.ids_T[place_t[is_text_t]],
        source_t=source_t,
        positions_t=tokens.positions_T[..., place_t],
        mask=encode_mask(tokens.segments, sharded=context.size > 1, needed_U=needed_U, multiple=multiple),
        media=tuple(ordinal_T[rows[media_T[rows]]] for rows in real),
        rows_R=local_T[tokens.rows_R],
        exchange=exchange,
        shares=tuple(shares),
        context=context,
    )
