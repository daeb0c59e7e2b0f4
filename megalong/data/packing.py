"""Packing: groups of [prefix | response 1 | .. | response G] side by side in one token sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalong.records import PolicyBatch, Prompt, RolloutGroup, Segment, TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTokens:
    """A prompt and the responses that share it, as token ids."""

    prompt: Prompt
    responses: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        return len(self.prompt.ids_P) + sum(len(response) for response in self.responses)


def plan_packs(lengths: Sequence[int], *, pack_tokens: int) -> list[list[int]]:
    """Indexes of the groups of each pack: in order, as many as fit in pack_tokens; a longer group is alone.

    Order is kept so that results do not depend on how lengths happen to fall.
    """
    packs: list[list[int]] = []
    held = 0
    for index, length in enumerate(lengths):
        if packs and held + length <= pack_tokens:
            packs[-1].append(index)
            held += length
        else:
            packs.append([index])
            held = length
    return packs


def pack_groups(groups: Sequence[GroupTokens]) -> TokenBatch:
    """One TokenBatch of all groups, in order. Raises ValueError on an empty response."""
    ids: list[int] = []
    positions: list[Tensor] = []
    segments: list[Segment] = []
    rows: list[Tensor] = []
    targets: list[int] = []
    response_of: list[int] = []
    for group in groups:
        start, prefix_len, parent = len(ids), len(group.prompt.ids_P), len(segments)
        segments.append(Segment(start=start, length=prefix_len, parent=-1))
        ids += group.prompt.ids_P
        prefix_positions = group.prompt.positions_P
        positions.append(prefix_positions)
        for response in group.responses:
            if not response:
                raise ValueError(f"{group.prompt.sample.sample_id}: a response without tokens cannot be trained on")
            at, length = len(ids), len(response)
            segments.append(Segment(start=at, length=length, parent=parent))
            ids += response
            first = group.prompt.next_position
            positions.append(torch.arange(first, first + length).expand(*prefix_positions.shape[:-1], length))
            # The last prefix row predicts the first token of every response of the group.
            rows.append(torch.cat((torch.tensor([start + prefix_len - 1]), torch.arange(at, at + length - 1))))
            targets += response
            response_of += [len(rows) - 1] * length
    return TokenBatch(
        ids_T=torch.tensor(ids),
        positions_T=torch.cat(positions, dim=-1),
        segments=tuple(segments),
        selections=tuple(selection for group in groups for selection in group.prompt.selections),
        rows_R=torch.cat(rows),
        targets_R=torch.tensor(targets),
        response_R=torch.tensor(response_of),
    )


def pack_rollouts(
    groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], *, pack_tokens: int
) -> list[PolicyBatch]:
    """Rollout groups and their advantages ([G] each) as packs, without old and reference log-probabilities."""
    items = [GroupTokens(prompt=group.prompt, responses=group.response_ids) for group in groups]
    batches = []
    for pack in plan_packs([item.length for item in items], pack_tokens=pack_tokens):
        sampler = [value for index in pack for response in groups[index].logprobs for value in response]
        batches.append(
            PolicyBatch(
                tokens=pack_groups([items[index] for index in pack]),
                advantages_S=torch.cat([advantages[index] for index in pack]),
                sampler_logprobs_R=torch.tensor(sampler, dtype=torch.float32),
                old_logprobs_R=None,
                ref_logprobs_R=None,
            )
        )
    return batches
