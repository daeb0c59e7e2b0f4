"""Packs by hand: ids, positions that restart, and which row predicts which token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalong.data.packing import GroupTokens, by_videos, pack_groups, pack_rollouts, plan_packs
from megalong.records import MEDIA_TOKEN, FrameSelection, Prompt, RolloutGroup, Sample

VIDEO = FrameSelection(path="v.mp4", frames=(0,), seconds=(0.0,), height=8, width=8)


def prompt(name: str, ids: tuple[int, ...], selections: tuple[FrameSelection, ...] = ()) -> Prompt:
    sample = Sample(
        sample_id=name, question="q", answer="A", videos=tuple(s.path for s in selections), problem_type="open-ended",
        category="c", reasoning="", subtitles="",
    )  # fmt: skip
    return Prompt(
        sample=sample, ids_P=ids, selections=selections, positions_P=torch.arange(len(ids)), next_position=len(ids)
    )


def test_two_groups_by_hand() -> None:
    tokens = pack_groups(
        [
            GroupTokens(prompt=prompt("a", (5, MEDIA_TOKEN, 7), (VIDEO,)), responses=((11, 12), (13,), (14, 15, 16))),
            GroupTokens(prompt=prompt("b", (8, 9)), responses=((21, 22),)),
        ]
    )
    want_ids = [5, -1, 7, 11, 12, 13, 14, 15, 16, 8, 9, 21, 22]
    assert tokens.ids_T.tolist() == want_ids
    assert tokens.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 3]
    rows = [(0, 3, -1), (3, 2, 0), (5, 1, 0), (6, 3, 0), (9, 2, -1), (11, 2, 4)]
    assert [(segment.start, segment.length, segment.parent) for segment in tokens.segments] == rows
    assert tokens.response_lens == [2, 1, 3, 2]
    # Row 2, the last of the first prompt, predicts the first token of all three of its responses.
    assert tokens.rows_R.tolist() == [2, 3, 2, 2, 6, 7, 10, 11]
    assert tokens.targets_R.tolist() == [11, 12, 13, 14, 15, 16, 21, 22]
    assert tokens.response_R.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert tokens.selections == (VIDEO,)
    for tensor in (tokens.ids_T, tokens.positions_T, tokens.rows_R, tokens.targets_R, tokens.response_R):
        assert tensor.dtype == torch.int64


def test_three_rows_of_positions_are_equal_on_responses_and_go_on_where_the_prompt_says() -> None:
    rows = torch.tensor([[0, 1, 1, 4], [0, 1, 2, 4], [0, 2, 3, 4]])
    item = replace(prompt("a", (5, 6, 7, 8)), positions_P=rows, next_position=9)
    tokens = pack_groups(
        [GroupTokens(prompt=item, responses=((1, 2), (3,))), GroupTokens(prompt=item, responses=((4,),))]
    )
    want = torch.cat((rows, torch.tensor([[9, 10, 9]] * 3), rows, torch.tensor([[9]] * 3)), dim=1)
    assert torch.equal(tokens.positions_T, want)
    assert tokens.positions_T.dtype == torch.int64


def test_selections_are_in_the_order_of_the_media_places() -> None:
    other = FrameSelection(path="w.mp4", frames=(1,), seconds=(0.1,), height=8, width=8)
    tokens = pack_groups(
        [
            GroupTokens(prompt=prompt("a", (MEDIA_TOKEN, MEDIA_TOKEN), (other, VIDEO)), responses=((1,),)),
            GroupTokens(prompt=prompt("b", (MEDIA_TOKEN, 4), (VIDEO,)), responses=((1,),)),
        ]
    )
    assert tokens.selections == (other, VIDEO, VIDEO)


def test_an_empty_response_is_refused() -> None:
    with pytest.raises(ValueError, match="a: a response without tokens cannot be trained on"):
        pack_groups([GroupTokens(prompt=prompt("a", (1, 2)), responses=((3,), ()))])


groups_strategy = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=4,
)


@given(groups_strategy)
def test_every_row_predicts_the_token_that_follows_it_in_its_own_sequence(
    groups: list[tuple[int, tuple[tuple[int, ...], ...]]],
) -> None:
    items = [
        GroupTokens(prompt=prompt(str(index), tuple(range(100, 100 + length))), responses=responses)
        for index, (length, responses) in enumerate(groups)
    ]
    tokens = pack_groups(items)
    assert len(tokens.ids_T) == sum(item.length for item in items)
    sequences = [(item.prompt.ids_P, response) for item in items for response in item.responses]
    at = 0
    for number, (prefix, response) in enumerate(sequences):
        rows = tokens.rows_R[at : at + len(response)]
        assert tokens.response_R[at : at + len(response)].tolist() == [number] * len(response)
        assert tokens.targets_R[at : at + len(response)].tolist() == list(response)
        whole = prefix + response
        # The row before token k of the response is token len(prefix) + k - 1 of [prefix | response].
        assert tokens.ids_T[rows].tolist() == list(whole[len(prefix) - 1 : -1])
        assert tokens.positions_T[rows].tolist() == list(range(len(prefix) - 1, len(whole) - 1))
        at += len(response)
    assert at == len(tokens.rows_R)


def lone(length: int) -> GroupTokens:
    return GroupTokens(prompt=prompt(str(length), tuple(range(length - 1))), responses=((1,),))


@given(st.lists(st.integers(2, 50), max_size=30), st.integers(1, 60))
def test_plan_packs(lengths: list[int], pack_tokens: int) -> None:
    packs = plan_packs([lone(length) for length in lengths], pack_tokens=pack_tokens)
    assert [index for pack in packs for index in pack] == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in pack) for pack in packs]
    for pack, total in zip(packs, totals, strict=True):
        assert total <= pack_tokens or len(pack) == 1
    for before, after in zip(totals, packs[1:], strict=False):
        assert before + lengths[after[0]] > pack_tokens, "the next group would have fitted"


def test_a_group_longer_than_a_pack_is_alone() -> None:
    assert plan_packs([lone(length) for length in (3, 9, 2, 2, 4, 2)], pack_tokens=6) == [[0], [1], [2, 3], [4, 5]]
    assert plan_packs([], pack_tokens=5) == []


def about(video: int, question: tuple[int, ...], responses: tuple[tuple[int, ...], ...]) -> GroupTokens:
    """A question behind the five tokens of a video."""
    selection = replace(VIDEO, path=f"{video}.mp4")
    ids = (1, *(MEDIA_TOKEN,) * 3, 2, *question)
    return GroupTokens(prompt=prompt(f"{video}{question}", ids, (selection,)), responses=responses)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.lists(st.integers(3, 5), max_size=4).map(tuple),
            st.lists(st.lists(st.integers(6, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3).map(tuple),
        ),
        max_size=12,
    ),
    st.integers(1, 80),
    st.booleans(),
)
def test_packs_hold_as_many_questions_about_a_video_as_fit(
    drawn: list[tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]]], pack_tokens: int, share: bool
) -> None:
    groups = [about(*item) for item in drawn]
    packs = plan_packs(groups, pack_tokens=pack_tokens, share_videos=share)
    assert [index for pack in packs for index in pack] == list(range(len(groups)))
    for pack in packs:
        made = pack_groups([groups[index] for index in pack], share_videos=share)
        assert len(made.ids_T) <= pack_tokens or len(pack) == 1
    for pack, after in zip(packs, packs[1:], strict=False):
        longer = pack_groups([groups[index] for index in (*pack, after[0])], share_videos=share)
        assert len(longer.ids_T) > pack_tokens, "the next group would have fitted"


def test_questions_about_one_video_fill_a_pack_that_has_room_for_the_video_once() -> None:
    groups = [about(0, (3, number), ((6, 7), (8,))) for number in range(4)]
    assert [group.length for group in groups] == [10] * 4
    # Six tokens of each question's ten are the first one's, too: 10 + 3 * 4.
    assert plan_packs(groups, pack_tokens=22) == [[0, 1, 2, 3]]
    assert plan_packs(groups, pack_tokens=21) == [[0, 1, 2], [3]]
    assert plan_packs(groups, pack_tokens=22, share_videos=False) == [[0, 1], [2, 3]]
    assert len(pack_groups(groups).ids_T) == 22


def test_questions_about_one_video_become_neighbours_where_the_first_stood() -> None:
    groups = [about(0, (3,), ((6,),)), lone(4), about(1, (3,), ((6,),)), about(0, (4,), ((6,),)), lone(5)]
    assert by_videos([group.prompt for group in groups]) == [0, 3, 1, 2, 4]


def test_pack_rollouts_keeps_logprobs_and_advantages_beside_their_responses() -> None:
    def group(name: str, responses: tuple[tuple[int, ...], ...], start: float) -> RolloutGroup:
        values = iter(range(100))
        return RolloutGroup(
            prompt=prompt(name, (1, 2, 3)),
            response_ids=responses,
            logprobs=tuple(tuple(start - next(values) for _ in response) for response in responses),
            texts=("",) * len(responses),
            truncated=(False,) * len(responses),
            weights_version=0,
        )

    groups = [group("a", ((4, 5), (6,)), -1.0), group("b", ((7,), (8, 9)), -10.0), group("c", ((4,), (4,)), -20.0)]
    advantages = [torch.tensor([1.0, -1.0]), torch.tensor([0.5, -0.5]), torch.tensor([0.0, 2.0])]
    batches = pack_rollouts(groups, advantages, pack_tokens=12)
    assert [batch.tokens.ids_T.tolist() for batch in batches] == [
        [1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9],
        [1, 2, 3, 4, 4],
    ]
    assert batches[0].advantages_S.tolist() == [1.0, -1.0, 0.5, -0.5]
    assert batches[0].sampler_logprobs_R.tolist() == [-1.0, -2.0, -3.0, -10.0, -11.0, -12.0]
    assert batches[0].sampler_logprobs_R.dtype == torch.float32
    assert batches[1].advantages_S.tolist() == [0.0, 2.0]
    assert batches[1].sampler_logprobs_R.tolist() == [-20.0, -21.0]
    assert all(batch.old_logprobs_R is None and batch.ref_logprobs_R is None for batch in batches)
    assert pack_rollouts([], [], pack_tokens=12) == []
