"""The plan of attention calls: what is shared is computed once, and context-parallel ranks have equal work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalong.attention.context import shard_pack
from megalong.attention.tree import AttentionPlan, Call, encode_segments, plan_calls, plan_rows
from megalong.parallel.layout import ContextGroups
from megalong.records import Segment

Tree = tuple[int, list["Tree"]]
"""Rows of a segment, and what sees them."""


def group_tree(prefix: int, responses: Sequence[int]) -> Tree:
    return prefix, [(length, []) for length in responses]


def segments_of(trees: Sequence[Tree]) -> list[Segment]:
    segments: list[Segment] = []

    def add(trees: Sequence[Tree], parent: int) -> None:
        for length, below in trees:
            segments.append(Segment(start=segments[-1].stop if segments else 0, length=length, parent=parent))
            add(below, len(segments) - 1)

    add(trees, -1)
    return segments


def group_segments(prefix: int, responses: list[int]) -> list[Segment]:
    return segments_of([group_tree(prefix, responses)])


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


def nodes_of(trees: Sequence[Tree], above: int = 0) -> Iterator[tuple[int, int, bool]]:
    """(rows, rows above them, whether nothing is below) of each segment; one with a single child is one with it."""
    for length, below in trees:
        while len(below) == 1:
            [(more, below)] = below
            length += more
        yield length, above, not below
        yield from nodes_of(below, above + length)


RESPONSES = st.lists(st.integers(1, 60) | st.integers(1, 4000), min_size=1, max_size=8)
GROUPS = st.builds(group_tree, st.integers(200, 3000), RESPONSES)
QUESTIONS = st.builds(group_tree, st.integers(1, 400), RESPONSES)
VIDEOS = st.tuples(st.integers(200, 3000), st.lists(QUESTIONS, min_size=2, max_size=3))


@settings(max_examples=100, deadline=None)
@given(
    trees=st.lists(GROUPS | VIDEOS, min_size=1, max_size=4),
    ring=st.integers(2, 4),
    a2a=st.sampled_from([1, 2, 4]),
)
@example(trees=[group_tree(100_000, [900, 3, 411, 77, 1000, 1, 640, 250])], ring=4, a2a=2)
@example(trees=[group_tree(70_000, [1, 300]), (30_000, [group_tree(4, [500, 20]), group_tree(6, [7])])], ring=2, a2a=4)
@example(trees=[group_tree(900, [30_000, 5, 20_000]), group_tree(9000, [400])], ring=4, a2a=1)
def test_context_parallel_ranks_have_equal_work_and_rows(trees: list[Tree], ring: int, a2a: int) -> None:
    """Any pack. The ranks of an all-to-all group share their ring rank's plan by heads: equal rows are equal work."""
    segments, nodes = segments_of(trees), list(nodes_of(trees))
    shares = plans(segments, ring)
    covered = sorted(row for plan in shares for span in plan.rows for row in range(*span))
    assert covered == list(range(segments[-1].stop))
    rows = [plan.num_rows for plan in shares]
    assert max(rows) - min(rows) <= len(nodes)

    work = [pairs(plan) for plan in shares]
    assert sum(work) == sum(length * above + length * (length + 1) // 2 for length, above, _ in nodes)
    # A rank with the end of a short leaf sees more of it than others of theirs: of shares of s rows, one at the end of
    # l rows has s * (l - s / 2) pairs there, l * l / (2 * ring) would be its part, and that is at most s * l * (1 -
    # 1 / sqrt(ring)) too many. All else is equal but for a row, or chunks that begin a row later.
    uneven = max((length / above for length, above, leaf in nodes if leaf and 4 * length <= above), default=0.0)
    rounding = 1.1 * sum(above + length for length, above, _ in nodes)
    assert max(work) <= (1 + uneven * (1 - ring**-0.5)) * sum(work) / ring + rounding

    sharded = shard_pack(segments, ContextGroups(size=ring * a2a, ring_size=ring, a2a_size=a2a), multiple=2)
    for at, count in enumerate(rows):
        (held,) = {len(rows_t) for rows_t in sharded[at * a2a : (at + 1) * a2a]}
        assert count / a2a <= held < count / a2a + 2


@pytest.mark.parametrize(
    "encoded", [(), (1, 2, -1), (0, 0, -1), (0, 2, -1, 2, 2, 5), (0, 2, -1, 2, 1, -1, 3, 1, 0)],
    ids=["empty", "gap", "no rows", "unknown parent", "parent is closed"],
)  # fmt: skip
def test_segments_that_are_no_forest_are_refused(encoded: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="segment"):
        plan_calls(encoded, ring_rank=0, ring_size=1)
