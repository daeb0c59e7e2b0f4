from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from video_files import SQUARE

from megalong.config.tree import FrameSampling
from megalong.data.video import DecodeError, Orientation, VideoIndex, select_frames


def index_of(seconds):
    seconds_F = np.asarray(seconds, dtype=np.float64)
    return VideoIndex(
        path="v.mp4",
        ticks_F=np.arange(len(seconds_F)),
        seconds_F=seconds_F,
        key_ticks=(0,),
        key_dts=(0,),
        seconds_per_tick=1.0,
        width=64,
        height=48,
        orientation=Orientation(),
        counted=False,
    )


def uniform(index, num_frames, layout=SQUARE):
    return select_frames(
        index, sampling=FrameSampling.uniform, num_frames=num_frames, fps=1.0, max_frames=1, layout=layout
    )


def at_rate(index, fps, max_frames=8192, layout=SQUARE):
    return select_frames(index, sampling=FrameSampling.fps, num_frames=1, fps=fps, max_frames=max_frames, layout=layout)


@given(count=st.integers(1, 400), num_frames=st.integers(1, 500))
def test_uniform_is_rounded_linspace_or_everything(count, num_frames):
    selection = uniform(index_of(np.arange(count) / 25), num_frames)
    if count <= num_frames:
        assert selection.frames == tuple(range(count))
    else:
        assert selection.frames == tuple(np.round(np.linspace(0, count - 1, num_frames)).astype(int))
    assert selection.seconds == tuple(frame / 25 for frame in selection.frames)
    assert len(set(selection.frames)) == len(selection.frames)


def test_uniform_known_values():
    assert uniform(index_of(range(10)), 4).frames == (0, 3, 6, 9)
    assert uniform(index_of(range(10)), 1).frames == (0,)
    assert uniform(index_of([0.0]), 8).frames == (0,)


@given(
    gaps=st.lists(st.integers(1, 4000), max_size=60),
    fps=st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0, 7.5, 24.0, 29.97]),
)
def test_rate_takes_the_frame_on_display_at_each_time(gaps, fps):
    milliseconds = np.concatenate([[0], np.cumsum(gaps)]).astype(int)
    seconds = milliseconds / 1000
    expected = []
    k = 0
    while k / fps <= seconds[-1] + 1e-9:
        on_display = int(np.searchsorted(seconds, k / fps + 1e-9, side="right")) - 1
        if on_display not in expected:
            expected.append(on_display)
        k += 1
    assert at_rate(index_of(seconds), fps).frames == tuple(expected)


def test_rate_known_values():
    thirty = index_of(np.arange(301) * 1001 / 30000)  # 29.97 frames/s for 10.01 s
    assert at_rate(thirty, 1.0).frames == (0, 29, 59, 89, 119, 149, 179, 209, 239, 269, 299)
    with_a_hole = index_of([0.0, 0.4, 0.8, 5.0, 5.4])  # one picture is on display from 0.8 to 5.0
    assert at_rate(with_a_hole, 1.0).frames == (0, 2, 3)
    assert at_rate(with_a_hole, 1.0).seconds == (0.0, 0.8, 5.0)
    assert at_rate(index_of([0.0]), 2.0).frames == (0,)


def test_rate_is_capped_and_spread():
    hours = index_of(np.arange(3 * 3600))  # one frame a second
    assert at_rate(hours, 1.0).frames == tuple(np.round(np.linspace(0, 10799, 8192)).astype(int))
    assert at_rate(hours, 0.5, max_frames=3).frames == (0, 5400, 10798)


def test_rate_copes_with_a_wild_timestamp():
    assert at_rate(index_of([0.0, 0.5, 1e15]), 2.0).frames == (0, 1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform(index_of([0.0]), 0), r"num_frames is 0.*video\.num_frames"),
        (lambda: at_rate(index_of([0.0]), 0.0), r"fps is 0\.0.*video\.fps"),
        (lambda: at_rate(index_of([0.0]), float("nan")), r"fps is nan.*video\.fps"),
        (lambda: at_rate(index_of([0.0]), 1.0, max_frames=0), r"max_frames is 0.*video\.max_frames"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


PAIRS = replace(SQUARE, frames_per_step=2)


@pytest.mark.parametrize(
    ("count", "num_frames", "want"),
    [
        (9, 4, [0, 3, 5, 8]),
        (9, 5, [0, 2, 4, 6, 8, 8]),
        (5, 8, [0, 1, 2, 3, 4, 4]),
        (4, 8, [0, 1, 2, 3]),
        (3, 1, [0, 0]),
        (1, 8, [0, 0]),
    ],
)
def test_the_last_frame_is_repeated_to_fill_a_step_of_the_tower(count, num_frames, want):
    assert list(uniform(index_of(range(count)), num_frames, layout=PAIRS).frames) == want
    assert list(at_rate(index_of(range(count)), 1.0, max_frames=num_frames, layout=PAIRS).frames) == want


def test_a_picture_that_the_layout_has_no_size_for_is_undecodable():
    class Refusing:
        frames_per_step = 1

        def frame_size(self, *, height, width, num_frames):
            raise ValueError(f"{height} x {width} is too slim")

    with pytest.raises(DecodeError, match="48 x 64 is too slim"):
        uniform(index_of([0.0]), 8, layout=Refusing())


def test_the_layout_decides_the_size_from_the_file_s_and_the_number_of_frames():
    class Fitted:
        frames_per_step = 1

        def frame_size(self, *, height, width, num_frames):
            return height // num_frames, width // num_frames

    chosen = uniform(index_of(range(4)), 2, layout=Fitted())
    assert (chosen.height, chosen.width) == (24, 32)
