"""One pass of packs through the stages of a replica: megatron-core's own 1F1B schedule, or a plain loop without stages.

A pack is a micro-batch. Its vision embeddings are made by all ranks of the replica together, which they cannot do while
the stages are at different packs: with stages they are made before the schedule starts, and their gradients go back to
the ranks that encoded the frames after it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megalong.parallel.collectives import broadcast_object
from megalong.parallel.layout import ParallelLayout
from megalong.records import FrameSelection, TokenBatch

Embeddings = Callable[[Sequence[FrameSelection]], Tensor | None]
Finish = Callable[[int, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(index of the pack, hidden_RD of its response rows) -> (loss, what to return for the pack). Last stage only."""


def run_packs(
    ddp: nn.Module, layout: ParallelLayout, packs: Sequence[TokenBatch], finish: Finish, *,
    embeddings: Embeddings, backward: bool,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Forward of every pack, and with `backward` the backward of its loss into `main_grad`.

    Every rank of the replica calls this with the same packs. Returns what `finish` gave for each pack, detached and on
    the CPU, on every rank of the replica.
    """
    if layout.pp_size > 1:
        return _through_stages(ddp, layout, packs, finish, embeddings=embeddings, backward=backward)
    done = []
    for index, tokens in enumerate(packs):
        loss, values = finish(index, ddp(tokens, embeddings(tokens.selections)))
        if backward:
            loss.backward()
        done.append(_on_cpu(values))
    return done


def _through_stages(
    ddp: nn.Module, layout: ParallelLayout, packs: Sequence[TokenBatch], finish: Finish, *,
    embeddings: Embeddings, backward: bool,
) -> list[dict[str, Tensor]]:  # fmt: skip
    vision = [_PackVision(embeddings(tokens.selections), layout) for tokens in packs]
    order = iter(range(len(packs)))

    def forward_pack(*_: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        index = next(order)  # the schedule takes packs in order on every stage

        def loss_of(hidden_RD: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, values = finish(index, hidden_RD)
            # megatron adds up a number of tokens and, as losses are sums here, divides nothing by it.
            return loss, torch.zeros((), dtype=torch.int), {name: value.detach() for name, value in values.items()}

        return ddp(packs[index], vision[index].given_ND), loss_of

    llm = ddp.module.llm
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
        for of_pack in vision:
            of_pack.backward()
    return broadcast_object([_on_cpu(values) for values in done], source=layout.pp_size - 1, group=layout.pp)


class _PackVision:
    """The embeddings of one pack: made on every rank of the replica, given to the LLM on the first stage alone."""

    def __init__(self, embeds_ND: Tensor | None, layout: ParallelLayout) -> None:
        self.layout = layout
        self.given_ND: Tensor | None = None
        self.made_ND: Tensor | None = None  # with the graph of the tower, when that is trained
        if embeds_ND is not None and layout.is_first_stage:
            self.given_ND = embeds_ND.detach().requires_grad_(embeds_ND.requires_grad)
        if embeds_ND is not None and embeds_ND.requires_grad:
            self.made_ND = embeds_ND

    def backward(self) -> None:
        """Hand the gradient that arose on the first stage to the ranks that encoded the frames (collective)."""
        if self.made_ND is None:
            return
        grad_ND = torch.empty_like(self.made_ND) if self.given_ND is None else self.given_ND.grad
        dist.broadcast(grad_ND, group_src=0, group=self.layout.pp)
        self.made_ND.backward(grad_ND)


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in values.items()}
