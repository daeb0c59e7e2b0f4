"""M-RoPE positions against transformers' get_rope_index, and against the rule written out token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from megalong.models.qwen2_5_vl.positions import Grid, mrope_positions, step_ticks
from megalong.records import MEDIA_TOKEN, FrameSelection

TICKS_PER_SECOND = 4


class StockRule:
    """transformers' rule, without a model's weights around it."""

    get_rope_index = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids

    def __init__(self) -> None:
        vision = {"spatial_merge_size": 2, "tokens_per_second": TICKS_PER_SECOND}
        self.config = Qwen2_5_VLConfig(vision_config=vision)

    def __call__(self, ids: list[int], videos: list[tuple[FrameSelection, int, int]]) -> tuple[Tensor, int]:
        """Positions [3, P], and the position at which its generate() would go on."""
        grids = [[len(selection.frames) // 2, 2 * rows, 2 * columns] for selection, rows, columns in videos]
        kinds = torch.tensor([[2 if token == MEDIA_TOKEN else 0 for token in ids]])
        seconds = [2 * mean_distance(selection) for selection, _, _ in videos]
        positions, delta = self.get_rope_index(
            torch.tensor([ids]),
            mm_token_type_ids=kinds,
            video_grid_thw=torch.tensor(grids) if grids else None,
            second_per_grid_ts=torch.tensor(seconds, dtype=torch.float64),
        )
        return positions[:, 0], len(ids) + int(delta)


def mean_distance(selection: FrameSelection) -> float:
    distances = [b - a for a, b in zip(selection.seconds, selection.seconds[1:], strict=False) if b > a]
    return sum(distances) / len(distances) if distances else 1.0


def video(num_frames: int, distance: float) -> FrameSelection:
    """Frames `distance` seconds apart; an odd last one is repeated."""
    frames = [*range(num_frames), *[num_frames - 1] * (num_frames % 2)]
    return FrameSelection(
        path="v", frames=tuple(frames), seconds=tuple(3 + distance * frame for frame in frames), height=1, width=1
    )


def prompt(videos: list[tuple[FrameSelection, int, int]], texts: list[int]) -> tuple[list[int], list[Grid]]:
    """Text before, between and after the videos, as many tokens as `texts` says."""
    ids, grids = [5] * texts[0], []
    for (selection, rows, columns), after in zip(videos, texts[1:], strict=True):
        ticks = step_ticks(selection, frames_per_step=2, ticks_per_second=TICKS_PER_SECOND)
        grids.append(Grid(ticks=ticks, rows=rows, columns=columns))
        ids += [MEDIA_TOKEN] * grids[-1].num_tokens + [7] * after
    return ids, grids


CASES = {
    "text only": ([], [6]),
    "one frame between text": ([(video(1, 0.0), 2, 3)], [4, 5]),
    "one frame first": ([(video(1, 0.0), 3, 2)], [0, 5]),
    "a video that is wider than long": ([(video(8, 0.25), 2, 9)], [3, 2]),
    "an odd number of frames": ([(video(7, 0.25), 2, 9)], [3, 2]),
    "two videos of other sizes": ([(video(6, 0.25), 6, 2), (video(4, 1.5), 3, 13)], [2, 3, 4]),
    "64 frames, an eighth of a tick apart": ([(video(64, 1 / 32), 4, 8)], [5, 6]),
    "64 frames at a film's rate": ([(video(64, 1001 / 24000), 4, 12)], [5, 6]),
}


@pytest.mark.parametrize(("videos", "texts"), CASES.values(), ids=CASES.keys())
def test_positions_equal_transformers(videos: list, texts: list[int]) -> None:
    ids, grids = prompt(videos, texts)
    got, following = mrope_positions(ids, grids)
    want, want_following = StockRule()(ids, videos)
    assert torch.equal(got, want)
    assert following == want_following
    assert got.dtype == torch.int64


def test_a_long_video_pushes_text_behind_its_last_moment() -> None:
    """64 frames at 2 per second run over 124 ticks but only 2 rows and columns."""
    videos = [(video(64, 0.5), 2, 2)]
    ids, grids = prompt(videos, [5, 4])
    got, following = mrope_positions(ids, grids)
    want, _ = StockRule()(ids, videos)
    vision_end = 5 + 32 * 4
    assert torch.equal(got[:, :vision_end], want[:, :vision_end])
    assert got[0, 5:vision_end:4].tolist() == [5 + 4 * step for step in range(32)]
    assert got[:, vision_end:].tolist() == [[130, 131, 132, 133]] * 3
    assert following == 134
    # Without text behind the video, where generate() goes on is the same in transformers.
    ids, grids = prompt(videos, [5, 0])
    assert mrope_positions(ids, grids)[1] == StockRule()(ids, videos)[1] == 130


def test_ticks_are_whole_and_not_one_early_for_rounding() -> None:
    def ticks(*seconds: float) -> tuple[int, ...]:
        selection = FrameSelection(path="v", frames=tuple(range(len(seconds))), seconds=seconds, height=1, width=1)
        return step_ticks(selection, frames_per_step=2, ticks_per_second=2)

    assert ticks(*(0.1 * frame for frame in range(10))) == (0, 0, 0, 1, 1)
    thirds = [frame / 3 for frame in range(12)]
    assert ticks(*thirds) == (0, 1, 2, 4, 5, 6)
    # 25 frames a second from a clock of 1/12800: sums like 0.52 + 0.04 are not exact.
    assert ticks(*(frame * 512 * (1 / 12800) for frame in range(0, 250, 25))) == (0, 4, 8, 12, 16)
    assert ticks(7.0, 7.0) == (0,)


@given(
    texts=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)), min_size=3, max_size=3),
    distance=st.floats(0.01, 3.0),
)
@settings(max_examples=60, deadline=None)
def test_the_rule_holds_token_by_token(texts: list[int], sizes: list, distance: float) -> None:
    texts = [texts[0], *(max(1, text) for text in texts[1:-1]), texts[-1]]  # runs of two videos do not touch
    videos = [(video(frames, distance), rows, columns) for frames, rows, columns in sizes]
    ids, grids = prompt(videos, texts)
    want: list[tuple[int, int, int]] = []
    at = 0
    for index, text in enumerate(texts):
        if index:
            grid = grids[index - 1]
            cells = [(t, r, c) for t in grid.ticks for r in range(grid.rows) for c in range(grid.columns)]
            want += [(at + t, at + r, at + c) for t, r, c in cells]
            at += 1 + max(max(cell) for cell in cells)
        want += [(at + k,) * 3 for k in range(text)]
        at += text
    got, following = mrope_positions(ids, grids)
    assert got.T.tolist() == [list(row) for row in want]
    assert following == at


def test_runs_that_are_not_the_grids_are_refused() -> None:
    grid = Grid(ticks=(0,), rows=2, columns=2)
    with pytest.raises(ValueError, match="3 vision tokens in a row at token 1, expected 4"):
        mrope_positions([5, *[MEDIA_TOKEN] * 3], [grid])
    with pytest.raises(ValueError, match="4 vision tokens in a row at token 0, expected none"):
        mrope_positions([MEDIA_TOKEN] * 4, [])
    with pytest.raises(ValueError, match="more grids"):
        mrope_positions([5, 5], [grid])
