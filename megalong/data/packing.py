"""Packing: groups of [prefix | response 1 | .. | response G] side by side in one token sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from megalong.records import MEDIA_TOKEN, FrameSelection, PolicyBatch, Prompt, RolloutGroup, Segment, TokenBatch


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


class _PackBuilder:
    """Lists that grow by one segment at a time."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[Tensor] = []
        self.segments: list[Segment] = []
        self.selections: list[FrameSelection] = []
        self.rows: list[Tensor] = []
        self.targets: list[int] = []
        self.response_of: list[int] = []

    def add(self, ids: Sequence[int], positions: Tensor, *, parent: int) -> int:
        """Append a segment; returns its index."""
        self.segments.append(Segment(start=len(self.ids), length=len(ids), parent=parent))
        self.ids += ids
        self.positions.append(positions)
        return len(self.segments) - 1

    def add_responses(self, group: GroupTokens, *, prefix: int) -> None:
        """The group's responses behind segment `prefix`, whose last row predicts the first token of all of them."""
        positions_P, last = group.prompt.positions_P, self.segments[prefix].stop - 1
        for response in group.responses:
            if not response:
                raise ValueError(f"{group.prompt.sample.sample_id}: a response without tokens cannot be trained on")
            length, first = len(response), group.prompt.next_position
            positions = torch.arange(first, first + length).expand(*positions_P.shape[:-1], length)
            at = self.segments[self.add(response, positions, parent=prefix)].start
            self.targets += response
            self.response_of += [len(self.rows)] * length
            self.rows.append(torch.cat((torch.tensor([last]), torch.arange(at, at + length - 1))))

    def build(self) -> TokenBatch:
        return TokenBatch(
            ids_T=torch.tensor(self.ids),
            positions_T=torch.cat(self.positions, dim=-1),
            segments=tuple(self.segments),
            selections=tuple(self.selections),
            rows_R=torch.cat(self.rows),
            targets_R=torch.tensor(self.targets),
            response_R=torch.tensor(self.response_of),
        )


def pack_groups(groups: Sequence[GroupTokens], *, share_videos: bool = True) -> TokenBatch:
    """One TokenBatch of all groups, in order. With share_videos, neighbours about the same videos share
    their prompts up to where these differ.

    Raises ValueError on an empty response.
    """
    pack = _PackBuilder()
    for _, run in groupby(groups, key=_videos_of):
        same = list(run)
        common = _common_prefix([group.prompt for group in same]) if share_videos and len(same) > 1 else 0
        video = -1
        if common:
            first = same[0].prompt
            video = pack.add(first.ids_P[:common], first.positions_P[..., :common], parent=-1)
            pack.selections += first.selections
        for group in same:
            prompt = group.prompt
            prefix = pack.add(prompt.ids_P[common:], prompt.positions_P[..., common:], parent=video)
            pack.selections += () if common else prompt.selections
            pack.add_responses(group, prefix=prefix)
    return pack.build()


def _videos_of(group: GroupTokens) -> object:
    """What neighbours must have in common to share a prefix: their videos. Groups without any share nothing."""
    return group.prompt.selections or id(group)


def _common_prefix(prompts: Sequence[Prompt]) -> int:
    """Tokens that all prompts begin with: at least all their vision tokens, and not the whole of any; else 0."""
    shortest = min(len(prompt.ids_P) for prompt in prompts) - 1
    ids_BP = torch.tensor([prompt.ids_P[:shortest] for prompt in prompts])
    positions_BP = torch.stack([torch.atleast_2d(prompt.positions_P)[:, :shortest] for prompt in prompts])
    same_P = (ids_BP == ids_BP[0]).all(0) & (positions_BP == positions_BP[0]).flatten(0, 1).all(0)
    common = shortest if bool(same_P.all()) else int(same_P.int().argmin())
    media = [MEDIA_TOKEN in prompt.ids_P[common:] for prompt in prompts]
    return 0 if any(media) else common


def pack_rollouts(
    groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], *, pack_tokens: int, share_prefix: bool = True
) -> list[PolicyBatch]:
    """Rollout groups and their advantages ([G] each) as packs, without old and reference log-probabilities.

    Questions about the same videos come to stand side by side. share_prefix=False: every response is a sequence of its
    own, with its own copy of the prompt.
    """
    first_of = {group.prompt.selections: index for index, group in reversed(list(enumerate(groups)))}
    order = sorted(range(len(groups)), key=lambda index: (first_of[groups[index].prompt.selections], index))
    items: list[tuple[GroupTokens, list[tuple[float, ...]], Tensor]] = []
    for index in order:
        group, advantages_G = groups[index], advantages[index]
        cuts = [slice(0, None)] if share_prefix else [slice(i, i + 1) for i in range(len(group.response_ids))]
        items += [
            (
                GroupTokens(prompt=group.prompt, responses=group.response_ids[cut]),
                group.logprobs[cut],
                advantages_G[cut],
            )
            for cut in cuts
        ]
    batches = []
    for pack in plan_packs([tokens.length for tokens, _, _ in items], pack_tokens=pack_tokens):
        chosen = [items[index] for index in pack]
        sampler = [value for _, logprobs, _ in chosen for response in logprobs for value in response]
        tokens = [tokens for tokens, _, _ in chosen]
        batches.append(
            PolicyBatch(
                tokens=pack_groups(tokens, share_videos=share_prefix),
                advantages_S=torch.cat([advantages_G for _, _, advantages_G in chosen]),
                sampler_logprobs_R=torch.tensor(sampler, dtype=torch.float32),
                old_logprobs_R=None,
                ref_logprobs_R=None,
            )
        )
    return batches
