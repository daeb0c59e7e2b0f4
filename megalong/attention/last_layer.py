"""The rows that the last layer computes: those that predict a response token.

Nothing reads the others behind that layer. They are keys and values in its attention, but have no query, no output
projection, no MLP and no final norm. The layers before cut a pack by its attention, where the prompt is nearly all the
work; here the prompt has one row, so the rows are dealt out anew, evenly over the context-parallel ranks.

Two things still run on all rows. The query projection is one matrix with those of keys and values, behind a norm that
Transformer Engine fuses with it, and a twentieth of a 7B layer's weights. And a forced kernel that merges no calls
(model.attention=te) has no form for a row without the rows before it: its outputs are picked instead of its queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from megalong_kernels.sequence_shard import PADDING
from torch import Tensor

from megalong.attention.context import deal_rows, places_of, shard_pack
from megalong.attention.tree import AttentionPlan, Range, plan_rows
from megalong.parallel.exchange import ExchangePlan, exchange_rows, plan_exchange
from megalong.parallel.layout import ContextGroups
from megalong.records import Segment, TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class NeededRows:
    """One context-parallel rank's part. t: its rows in the layers before; n: its rows in the last one, with padding."""

    calls: AttentionPlan  # queries of the rank's all-to-all group on the keys of the whole pack
    picked_m: Tensor  # [m] int64, CPU: of its t rows those that any rank computes, rank after rank
    exchange: ExchangePlan | None  # of the picked rows; None: this rank alone
    num_rows: int  # n
    context: ContextGroups

    def take(self, rows: Tensor) -> Tensor:
        """[t, ...] -> [n, ...], zeros as padding. Collective over the context-parallel group, as is its backward."""
        return self.deliver(rows.index_select(0, self.picked_m.to(rows.device)))

    def deliver(self, picked: Tensor) -> Tensor:
        """take() of rows that are picked already, [m, ...]."""
        if self.exchange is not None:
            picked = exchange_rows(picked, self.exchange, group=self.context.group)
        return F.pad(picked, (0, 0) * (picked.dim() - 1) + (0, self.num_rows - len(picked)))


@lru_cache(maxsize=16)
def needed_rows(
    encoded: tuple[int, ...], spans: tuple[Range, ...], context: ContextGroups, multiple: int
) -> NeededRows:
    """encoded: encode_segments. spans: the rows that predict, as row_spans has them. multiple: as in shard_pack."""
    triples = zip(*[iter(encoded)] * 3, strict=True)
    segments = [Segment(start=start, length=length, parent=parent) for start, length, parent in triples]
    rows_U = torch.cat([torch.arange(*span) for span in spans] or [torch.empty(0, dtype=torch.int64)])
    shares = deal_rows(rows_U, context, multiple=multiple)
    owner_T, local_T = places_of(shard_pack(segments, context, multiple=multiple), segments[-1].stop)
    plan = plan_exchange(owner_T, local_T, [rows[rows != PADDING] for rows in shares], rank=context.rank)
    first = context.ring_rank * context.a2a_size
    of_ring = torch.cat(shares[first : first + context.a2a_size])
    return NeededRows(
        calls=plan_rows(encoded, row_spans(of_ring[of_ring != PADDING])),
        picked_m=plan.send_rows,
        exchange=replace(plan, send_rows=torch.arange(len(plan.send_rows))) if context.size > 1 else None,
        num_rows=len(shares[context.rank]),
        context=context,
    )


def row_spans(rows_U: Tensor) -> tuple[Range, ...]:
    """Ascending rows as ranges."""
    if not len(rows_U):
        return ()
    breaks = ((rows_U.diff() != 1).nonzero()[:, 0] + 1).tolist()
    return tuple((int(run[0]), int(run[-1]) + 1) for run in rows_U.tensor_split(breaks))


def predicting_rows(tokens: TokenBatch) -> Tensor:
    """The pack rows that predict any token, [U] int64, ascending: a prompt's last row once for all its responses."""
    return tokens.rows_R.unique()
