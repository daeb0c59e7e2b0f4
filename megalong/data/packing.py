"""Packing: groups of [prefix | response 1 | .. | response G] side by side in one token sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Neighbours:
    """Groups side by side about the same videos: what all their prompts begin with stands in the pack once."""

    groups: tuple[GroupTokens, ...]
    common: int = 0  # tokens that the prompts of several groups begin with

    @property
    def length(self) -> int:
        return sum(group.length for group in self.groups) - self.common * (len(self.groups) - 1)

    def takes(self, group: GroupTokens) -> bool:
        """Whether the group is about the same videos; groups without any share nothing."""
        selections = group.prompt.selections
        return bool(selections) and selections == self.groups[0].prompt.selections

    def joined(self, group: GroupTokens) -> _Neighbours:
        common = _common_prefix(self.groups[0].prompt, group.prompt)
        if len(self.groups) > 1:
            common = min(common, self.common)
        return _Neighbours(groups=(*self.groups, group), common=common)


def plan_packs(groups: Sequence[GroupTokens], *, pack_tokens: int, share_videos: bool = True) -> list[list[int]]:
    """Indexes of the groups of each pack: in order, as many as fit in pack_tokens; a longer group is alone.

    share_videos: what pack_groups has neighbours share counts once. Order is kept so that results do not depend on how
    lengths happen to fall.
    """
    packs: list[list[int]] = []
    held, last = 0, None
    for index, group in enumerate(groups):
        alone = _Neighbours(groups=(group,))
        if share_videos and last is not None and last.takes(group):
            now = last.joined(group)
            more = now.length - last.length
        else:
            now, more = alone, alone.length
        if packs and held + more <= pack_tokens:
            packs[-1].append(index)
            held, last = held + more, now
        else:
            packs.append([index])
            held, last = alone.length, alone
    return packs


def by_videos(prompts: Sequence[Prompt]) -> list[int]:
    """An order of the prompts in which those about the same videos are neighbours: where the first of them stood."""
    first_of = {prompt.selections: index for index, prompt in reversed(list(enumerate(prompts)))}
    places = [first_of[prompt.selections] if prompt.selections else index for index, prompt in enumerate(prompts)]
    return sorted(range(len(prompts)), key=places.__getitem__)


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
    for same in _neighbours(groups, share_videos=share_videos):
        common, video = same.common, -1
        if common:
            first = same.groups[0].prompt
            video = pack.add(first.ids_P[:common], first.positions_P[..., :common], parent=-1)
            pack.selections += first.selections
        for group in same.groups:
            prompt = group.prompt
            prefix = pack.add(prompt.ids_P[common:], prompt.positions_P[..., common:], parent=video)
            pack.selections += () if common else prompt.selections
            pack.add_responses(group, prefix=prefix)
    return pack.build()


def _neighbours(groups: Sequence[GroupTokens], *, share_videos: bool) -> list[_Neighbours]:
    found: list[_Neighbours] = []
    for group in groups:
        if share_videos and found and found[-1].takes(group):
            found[-1] = found[-1].joined(group)
        else:
            found.append(_Neighbours(groups=(group,)))
    return found


def _common_prefix(one: Prompt, other: Prompt) -> int:
    """Tokens that both prompts begin with: at least all their vision tokens, and not the whole of either; else 0."""
    shortest = min(len(one.ids_P), len(other.ids_P)) - 1
    ids, other_ids = one.ids_P[:shortest], other.ids_P[:shortest]
    common = shortest
    if ids != other_ids:
        common = next(index for index, (token, its) in enumerate(zip(ids, other_ids, strict=True)) if token != its)
    differ_P = torch.atleast_2d(one.positions_P[..., :common] != other.positions_P[..., :common]).any(0)
    if bool(differ_P.any()):
        common = int(differ_P.int().argmax())
    media = any(MEDIA_TOKEN in prompt.ids_P[common:] for prompt in (one, other))
    return 0 if media else common


def pack_rollouts(
    groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], *, pack_tokens: int, share_prefix: bool = True
) -> list[PolicyBatch]:
    """Rollout groups and their advantages ([G] each) as packs, without old and reference log-probabilities.

    Questions about the same videos come to stand side by side. share_prefix=False: every response is a sequence of its
    own, with its own copy of the prompt.
    """
    items: list[tuple[GroupTokens, list[tuple[float, ...]], Tensor]] = []
    for index in by_videos([group.prompt for group in groups]):
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
    groups_of = [tokens for tokens, _, _ in items]
    for pack in plan_packs(groups_of, pack_tokens=pack_tokens, share_videos=share_prefix):
        chosen = [items[index] for index in pack]
        sampler = [value for _, logprobs, _ in chosen for response in logprobs for value in response]
        batches.append(
            PolicyBatch(
                tokens=pack_groups([tokens for tokens, _, _ in chosen], share_videos=share_prefix),
                advantages_S=torch.cat([advantages_G for _, _, advantages_G in chosen]),
                sampler_logprobs_R=torch.tensor(sampler, dtype=torch.float32),
                old_logprobs_R=None,
                ref_logprobs_R=None,
            )
        )
    return batches
