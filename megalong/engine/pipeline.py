"""Forward and backward of packs over the ranks of a replica.

A pack is a micro-batch. Sharded over context-parallel ranks, one pack is computed by all of them at a time; unsharded,
each of them takes a pack of its own in turn. With pipeline stages, megatron-core's 1F1B schedule runs the packs, and
their vision embeddings, which all ranks of the replica make together, are made before it starts; the gradients go back
to the ranks that encoded the frames after it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megalong.attention.shard import PackShard, media_of_parts, shard_tokens
from megalong.parallel.collectives import broadcast_object, gather_objects
from megalong.parallel.layout import ParallelLayout
from megalong.records import MEDIA_TOKEN, TokenBatch

Embeddings = Callable[..., Tensor | None]
"""VisionStage.embeddings."""
Finish = Callable[[int, PackShard, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(index of the pack, this rank's shard, hidden states it scores) -> (loss, what to return). Last stage only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackRunner:
    """How the packs of a replica are run."""

    ddp: nn.Module
    layout: ParallelLayout
    embeddings: Embeddings
    sharded: bool  # False: every context-parallel rank has packs of its own, whole

    def run(self, packs: Sequence[TokenBatch], finish: Finish, *, backward: bool) -> list[dict[str, Tensor]]:
        """Forward of every pack, and with `backward` the backward of its loss into `main_grad`.

        Every rank of the replica calls this with the same packs. Returns what `finish` gave for each pack, detached
        and on the CPU, on every rank of the replica.
        """
        if self.layout.pp_size > 1:
            return self._through_stages(packs, finish, backward=backward)
        done: dict[int, dict[str, Tensor]] = {}
        for turn in self._turns(packs):
            embeds_nD = self._embed(turn)
            if turn.index is None:
                if backward and embeds_nD is not None and embeds_nD.requires_grad:
                    embeds_nD.backward(torch.zeros_like(embeds_nD))  # the others meet this rank in the exchange
                continue
            loss, values = finish(turn.index, turn.shard, self.ddp(turn.shard, embeds_nD))
            if backward:
                loss.backward()
            done[turn.index] = _on_cpu(values)
        if self.layout.context.size > 1 and not self.sharded:
            for part in gather_objects(done, group=self.layout.context.group):
                done.update(part)
        return [done[index] for index in range(len(packs))]

    def _turns(self, packs: Sequence[TokenBatch]) -> list[_Turn]:
        """What this rank does in turn; as many turns on every rank of the replica."""
        context = self.layout.context
        part = self.ddp.module.llm.sequence_part
        if self.sharded or context.size == 1:
            return [_Turn([tokens], i, shard_tokens(tokens, context, part=part)) for i, tokens in enumerate(packs)]
        turns = []
        for first in range(0, len(packs), context.size):
            together = packs[first : first + context.size]
            mine = first + context.rank
            index = mine if mine < len(packs) else None
            shard = shard_tokens(packs[mine], context.alone, part=part) if index is not None else None
            turns.append(_Turn(together, index, shard))
        return turns

    def _embed(self, turn: _Turn) -> Tensor | None:
        """[n, D'] embeddings for the MEDIA_TOKEN places that this rank embeds (on the first pipeline stage alone)."""
        layout = self.layout
        selections = [selection for tokens in turn.packs for selection in tokens.selections]
        if not selections:
            return None
        if layout.replica_size == 1:
            return self.embeddings(selections)
        _, parts = self.ddp.module.llm.sequence_part
        context = layout.context if self.sharded else layout.context.alone
        before, media = 0, []  # by context-parallel rank, then by slice of its rows
        for tokens in turn.packs:
            for slices in media_of_parts(tokens, context, parts=parts):
                media.append([rows_n + before for rows_n in slices])
            before += int((tokens.ids_T == MEDIA_TOKEN).sum())
        nothing = torch.empty(0, dtype=torch.int64)
        media += [[nothing] * parts] * (layout.context.size - len(media))
        wanted = [media[cp][tp % parts] if pp == 0 else nothing for tp, cp, pp in layout.places]
        # Tensor-parallel ranks without slices of their own compute the same from the same rows: the first one's
        # gradient is everyone's.
        return self.embeddings(selections, wanted, returns=[tp < parts for tp, _, _ in layout.places])

    def _through_stages(
        self, packs: Sequence[TokenBatch], finish: Finish, *, backward: bool
    ) -> list[dict[str, Tensor]]:
        layout = self.layout
        turns = self._turns(packs)
        made = [self._embed(turn) for turn in turns]
        given = [None if embeds is None else embeds.detach().requires_grad_(embeds.requires_grad) for embeds in made]
        order = iter(range(len(turns)))

        def forward_pack(*_: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
            index = next(order)  # the schedule takes packs in order on every stage
            shard = turns[index].shard

            def loss_of(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                loss, values = finish(index, shard, hidden)
                # megatron adds up a number of tokens and, as losses are sums here, divides nothing by it.
                return loss, torch.zeros((), dtype=torch.int), {name: value.detach() for name, value in values.items()}

            return self.ddp(shard, given[index] if layout.is_first_stage else None), loss_of

        llm = self.ddp.module.llm
        done = get_forward_backward_func()(
            forward_step_func=forward_pack,
            data_iterator=None,
            model=llm,
            num_microbatches=len(packs),
            seq_length=1,  # not read: the stages tell each other the shape of every pack
            micro_batch_size=1,
            forward_only=not backward,
        )
        llm.set_input_tensor([None])  # the activations of the last pack would stay
        if backward:
            for embeds, leaf in zip(made, given, strict=True):
                if embeds is not None and embeds.requires_grad:
                    embeds.backward(leaf.grad if leaf.grad is not None else torch.zeros_like(embeds))
        return broadcast_object([_on_cpu(values) for values in done], source=layout.pp_size - 1, group=layout.pp)


@dataclass(frozen=True, slots=True)
class _Turn:
    """The packs that the context-parallel ranks are at together, and this rank's part; None: it has none."""

    packs: Sequence[TokenBatch]
    index: int | None
    shard: PackShard | None


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in values.items()}
