"""Prompts of one call about the same video: the same names for its media, and computed by one before the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from engines import make_request

from megalong.records import MEDIA_TOKEN
from megalong.rollout import same_video
from megalong.rollout.engine import Request
from megalong.rollout.same_video import Turns, media_items

FRAMES = (8, 9, *(MEDIA_TOKEN,) * 5, 13, *(MEDIA_TOKEN,) * 2)
"""Two tokens, a run of media places, a token, another run."""


def question(*tail: int, front: Sequence[int] = FRAMES) -> Request:
    """Embeddings are looked at by nobody here: an engine's process is told of their rows."""
    return make_request((*front, *tail), None, (0,))


def names(request: Request, *, first_row: int = 0, call: int = 1) -> list[str]:
    return [item.name for item in media_items(request, first_row=first_row, call=call)]


def test_items_hold_the_places_rows_and_positions_of_a_prompt(monkeypatch: object) -> None:
    monkeypatch.setattr(same_video, "MEDIA_ITEM_TOKENS", 3)
    request = question(1, 2, 3)
    items = media_items(request, first_row=40, call=1)
    assert [(item.offset, item.length, item.row) for item in items] == [(2, 3, 40), (5, 2, 43), (8, 2, 45)]
    assert torch.equal(torch.cat([item.positions for item in items]), request.positions_P)
    assert len(set(names(request))) == 3
    assert media_items(question(1, 2, front=()), first_row=None, call=1) == []


def test_names_are_equal_for_the_same_rows_at_the_same_positions_in_one_call() -> None:
    one = question(1, 2, 3)
    assert names(one) == names(question(4))
    moved = one.positions_P.clone()
    moved[3] += 1
    for other in (
        names(one, first_row=7),  # another video
        names(one, call=2),  # perhaps other weights
        names(question(1, front=(8, *FRAMES))),
        names(replace(one, positions_P=moved)),
        names(question(1, front=(8, 9, *(MEDIA_TOKEN,) * 4, 13, *(MEDIA_TOKEN,) * 3))),  # cut into other frames
    ):
        assert names(one)[0] not in other, "keys and values behind it are others, too"


def test_a_video_s_first_question_goes_ahead_of_the_others_and_other_videos_beside_it() -> None:
    """Requests 0, 2 and 5 are about one video of 10 tokens, 1 and 3 about another, 4 is text."""
    requests = [question(1, 2), question(1, 2), question(3), question(3), question(4, 5, front=()), question(6)]
    turns = Turns(requests, [0, 7, 0, 7, None, 0], step_tokens=40)
    assert sorted(turns.take()) == [0, 1, 4]
    assert turns.take() == []
    assert turns.arrived(1)
    assert not turns.arrived(1), "its later tokens call nobody"
    assert turns.take() == [3]
    assert turns.waiting
    assert turns.arrived(0)
    assert turns.take() == [2, 5]
    assert not turns.waiting


def test_as_many_go_ahead_as_one_step_computes_and_a_video_that_is_there_costs_nothing() -> None:
    requests = [question(1, 2), question(1, 2), question(3), question(3), question(6)]
    turns = Turns(requests, [0, 7, 0, 7, 0], step_tokens=12)
    order = []
    while turns.waiting:
        order.append(turns.take())
        assert order[-1]
        assert all(turns.arrived(index) for index in order[-1])
    assert order == [[0], [2, 4], [1], [3]], "questions about a video one after the other"


def test_nobody_waits_for_a_prompt_that_begins_otherwise() -> None:
    """The same embeddings behind other tokens, and other embeddings behind the same."""
    requests = [question(1), question(2, front=(7, *FRAMES[1:])), question(3)]
    assert Turns(requests, [0, 0, 7], step_tokens=100).take() == [0, 1, 2]
