"""The plan of attention calls: what is shared is computed once, and the ranks of a ring have equal work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.tree import AttentionPlan, Call, encode_segments, plan_calls, plan_rows
from megalong.records import Segment


def group_segments(prefix: int, responses: list[int]) -> list[Segment]:
    segments = [Segment(start=0, length=prefix, parent=-1)]
    for length in responses:
        segments.append(Segment(start=segments[-1].stop, length=length, parent=0))
    return segments


def plans(segments: list[Segment], size: int) -> list[AttentionPlan]:
    return [plan_calls(tuple(encode_segments(segments)), ring_rank=rank, ring_size=size) for rank in range(size)]


def pairs(plan: AttentionPlan) -> int:
    """Key/query pairs a rank computes."""
    causal = sum(n * (n + 1) // 2 for call in plan.causal for n in (b - a for a, b in call.queries))
    full = sum(
        (q[1] - q[0]) * (k[1] - k[0]) for call in plan.unmasked for q, k in zip(call.queries, call.keys, strict=True)
    )
    return causal + full


def test_a_group_is_three_calls() -> None:
    (plan,) = plans(group_segments(10, [3, 1, 4]), 1)
    assert plan == AttentionPlan(
        num_keys=18,
        rows=((0, 10), (10, 13), (13, 14), (14, 18)),
        causal=(Call(((0, 10),), ((0, 10),)), Call(((10, 13), (13, 14), (14, 18)), ((10, 13), (13, 14), (14, 18)))),
        unmasked=(Call(((10, 18),), ((0, 10),), shared=True),),
    )


def test_one_response_makes_one_causal_call() -> None:
    (plan,) = plans(group_segments(10, [5]), 1)
    assert plan == AttentionPlan(15, ((0, 15),), (Call(((0, 15),), ((0, 15),)),), ())


def test_a_video_of_two_questions_is_read_once() -> None:
    segments = [
        Segment(start=0, length=100, parent=-1),
        Segment(start=100, length=4, parent=0),
        Segment(start=104, length=3, parent=1),
        Segment(start=107, length=3, parent=1),
        Segment(start=110, length=5, parent=0),
        Segment(start=115, length=2, parent=4),
        Segment(start=117, length=2, parent=4),
    ]
    (plan,) = plans(segments, 1)
    assert [call.keys for call in plan.unmasked] == [((0, 100),), ((100, 104),), ((110, 115),)]
    assert [call.queries for call in plan.unmasked] == [((100, 119),), ((104, 110),), ((115, 119),)]


def test_rows_that_predict_take_two_calls() -> None:
    """The prefix's last row sees what the responses see of it; a response's last row predicts nothing."""
    plan = plan_rows(tuple(encode_segments(group_segments(10, [3, 1, 4]))), ((9, 12), (14, 17)))
    assert plan == AttentionPlan(
        num_keys=18,
        rows=((9, 10), (10, 12), (14, 17)),
        causal=(Call(((1, 3), (3, 6)), ((10, 12), (14, 17))),),
        unmasked=(Call(((0, 6),), ((0, 10),), shared=True),),
    )


def test_rows_of_a_lone_sequence_have_a_triangle_and_what_lies_before_it() -> None:
    plan = plan_rows(tuple(encode_segments(group_segments(10, [5]))), ((9, 14),))
    assert plan == AttentionPlan(15, ((9, 14),), (Call(((0, 5),), ((9, 14),)),), (Call(((0, 5),), ((0, 9),)),))


def test_a_plan_of_no_rows_has_no_calls() -> None:
    assert plan_rows(tuple(encode_segments(group_segments(10, [5, 2]))), ()) == AttentionPlan(17, (), (), ())


def test_a_plan_of_all_rows_is_that_of_a_ring_of_one() -> None:
    segments = group_segments(10, [3, 1, 4])
    assert [plan_rows(tuple(encode_segments(segments)), ((0, 18),))] == plans(segments, 1)


def test_zigzag_of_a_prefix_over_two_ranks() -> None:
    first, second = plans(group_segments(8, [2, 2]), 2)
    assert first.rows == ((0, 2), (6, 8), (8, 10))
    assert second.rows == ((2, 6), (10, 12))


@settings(max_examples=60, deadline=None)
@given(
    prefix=st.integers(200, 3000),
    responses=st.lists(st.integers(1, 4000), min_size=1, max_size=8),
    size=st.integers(2, 4),
)
def test_ranks_of_a_ring_have_equal_work_and_rows(prefix: int, responses: list[int], size: int) -> None:
    shares = plans(group_segments(prefix, responses), size)
    covered = sorted(row for plan in shares for span in plan.rows for row in range(*span))
    assert covered == list(range(prefix + sum(responses)))
    rows = [plan.num_rows for plan in shares]
    # A zigzag share differs by at most two rows, and the short responses together by one.
    assert max(rows) - min(rows) <= 2 * (len(responses) + 1) + 1
    work = [pairs(plan) for plan in shares]
    assert max(work) <= 1.3 * sum(work) / size


@pytest.mark.parametrize(
    "encoded", [(), (1, 2, -1), (0, 0, -1), (0, 2, -1, 2, 2, 5), (0, 2, -1, 2, 1, -1, 3, 1, 0)],
    ids=["empty", "gap", "no rows", "unknown parent", "parent is closed"],
)  # fmt: skip
def test_segments_that_are_no_forest_are_refused(encoded: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="segment"):
        plan_calls(encoded, ring_rank=0, ring_size=1)
