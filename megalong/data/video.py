"""Video files on the CPU with PyAV: index the frames, choose some, decode exactly those.

Frames are named by their place in presentation order and found by their timestamp, never by the nearest
match. Three steps: `probe` reads the packets, `select_frames` chooses (a pure function of the index),
`decode_frames` decodes any range of the choice, so that the ranks of a replica can share a video. What
cannot be decoded raises DecodeError; no frame stands in for another.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from megalong.config.tree import FrameSampling
from megalong.data.video_index import DecodeError, Orientation, VideoIndex, lower_first, opened, probe
from megalong.data.video_layout import VideoLayout
from megalong.records import Clip, FrameSelection

__all__ = ["DecodeError", "Orientation", "VideoIndex", "decode_frames", "probe", "select_frames", "wanted_frames"]

# Timestamps are rationals kept as floats; a frame this close to a wanted time (s x fps) is on time.
_ON_TIME = 1e-6

_CORRUPT = "its data, or those of a frame before it, are corrupt"
_MISSING = "it is missing from the decoded stream"


def select_frames(
    index: VideoIndex, *, sampling: FrameSampling, num_frames: int, fps: float, max_frames: int, layout: VideoLayout
) -> FrameSelection:
    """Choose frames of a video, and their size; the arguments but `layout` are VideoConfig's fields of the same names.

    uniform: `num_frames` frames at linspace(0, N - 1) rounded half to even, or all N of a shorter file.
    fps: for t = 0, 1/fps, 2/fps, .. the frame on display at t (the last one at or before t), each once;
    when these are more than `max_frames`, `max_frames` of them at linspace as above.
    The last frame is repeated until the frames fill whole steps of layout.frames_per_step, as the stock processors do;
    a still picture is a file of one frame. Raises DecodeError when the layout has no size for the file's pictures.
    """
    if sampling is FrameSampling.uniform:
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}, expected at least 1; set video.num_frames")
        chosen = np.arange(index.num_frames)
        limit = num_frames
    else:
        if not fps > 0 or not np.isfinite(fps):
            raise ValueError(f"fps is {fps}, expected a positive number; set video.fps")
        if max_frames < 1:
            raise ValueError(f"max_frames is {max_frames}, expected at least 1; set video.max_frames")
        chosen = _frames_at_rate(index.seconds_F, fps)
        limit = max_frames
    if len(chosen) > limit:
        chosen = chosen[np.round(np.linspace(0, len(chosen) - 1, limit)).astype(np.int64)]
    try:
        height, width = layout.frame_size(height=index.height, width=index.width, num_frames=len(chosen))
    except ValueError as error:
        raise DecodeError(index.path, str(error)) from error
    chosen = np.append(chosen, [chosen[-1]] * (-len(chosen) % layout.frames_per_step)).astype(np.int64)
    return FrameSelection(
        path=index.path,
        frames=tuple(chosen.tolist()),
        seconds=tuple(index.seconds_F[chosen].tolist()),
        height=height,
        width=width,
    )


def decode_frames(selection: FrameSelection, *, first: int = 0, last: int | None = None, threads: int = 1) -> Clip:
    """Decode frames[first:last] of a selection, turned upright, RGB, resized to its height x width (uint8).

    The aspect ratio is not kept; the resize is bicubic with antialiasing, Pillow's and SigLIP's within 2 grey
    levels. Only the groups of pictures that hold wanted frames are decoded. `threads` is the codec's: leave it
    at 1 when several files are decoded at a time. Thread-safe. Raises DecodeError when one of the frames
    cannot be decoded, or when the file is not the one the selection was made from.
    """
    last = len(selection.frames) if last is None else last
    height, width = selection.height, selection.width
    _check_range(selection, first=first, last=last)
    frames_FHWC = np.empty((last - first, height, width, 3), dtype=np.uint8)
    if first < last:
        index = probe(selection.path)
        wanted = wanted_frames(selection, index, first=first, last=last)
        reformatter = VideoReformatter()  # keeps its conversion context from frame to frame
        with opened(index.path) as (container, stream):
            stream.codec_context.thread_count = threads
            for place, frame in enumerate(_wanted_frames(container, stream, index, wanted)):
                rgb_HWC = _to_rgb(frame, reformatter)
                stored = (width, height) if index.orientation.transpose else (height, width)
                frames_FHWC[place] = _turn(_resize(rgb_HWC, stored), index.orientation)
        frames_FHWC[len(wanted) :] = frames_FHWC[len(wanted) - 1]
    return Clip(selection=selection, first=first, frames_FHWC=frames_FHWC)


def wanted_frames(selection: FrameSelection, index: VideoIndex, *, first: int, last: int) -> list[int]:
    """Indexes of the distinct frames among [first, last) of a selection, ascending.

    Raises DecodeError when the file is not the one the selection was made from.
    """
    _check_range(selection, first=first, last=last)
    return list(dict.fromkeys(_checked_frames(selection, index)[first:last]))


def _check_range(selection: FrameSelection, *, first: int, last: int) -> None:
    if not 0 <= first <= last <= len(selection.frames):
        raise ValueError(f"{selection.path}: [{first}, {last}) is not a range of {len(selection.frames)} frames")
    if min(selection.height, selection.width) < 1:
        raise ValueError(
            f"{selection.path}: size is {selection.height} x {selection.width} pixels, expected at least 1 x 1"
        )


def _frames_at_rate(seconds_F: np.ndarray, fps: float) -> np.ndarray:
    """Indexes of the frames on display at 0, 1/fps, 2/fps, .. up to the last frame's time."""
    # Frame i is on display at k / fps when no multiple of 1/fps lies between it and its successor: compare
    # the first k at or after each. (A list of all times would be endless for a file with a wild timestamp.)
    due_F = np.ceil(seconds_F * fps - _ON_TIME)
    is_shown = np.append(due_F[1:] > due_F[:-1], due_F[-1] <= seconds_F[-1] * fps + _ON_TIME)
    return np.flatnonzero(is_shown)


def _checked_frames(selection: FrameSelection, index: VideoIndex) -> list[int]:
    frames = selection.frames
    distinct = frames[: frames.index(frames[-1]) + 1]
    repeats = frames[len(distinct) :]
    if any(a >= b for a, b in pairwise(distinct)) or set(repeats) - {frames[-1]} or frames[0] < 0:
        raise ValueError(f"{selection.path}: the selection's frames must be ascending, only the last one repeated")
    for frame, seconds in zip(frames, selection.seconds, strict=True):
        if frame >= index.num_frames or abs(index.seconds_F[frame] - seconds) > 1e-3:
            raise DecodeError(
                selection.path,
                f"frame {frame} at {seconds:.3f} s was selected, but the file has {index.num_frames} frames up to "
                f"{index.seconds_F[-1]:.3f} s with other times: it has changed since",
            )
    return list(frames)


def _wanted_frames(
    container: InputContainer, stream: VideoStream, index: VideoIndex, wanted: list[int]
) -> Iterator[VideoFrame]:
    """Yield exactly the wanted frames, in order. Raises DecodeError at the first that cannot be had."""
    if index.counted:
        yield from _counted_frames(container, stream, index, wanted)
        return
    for run in _runs(index, wanted):
        todo = run
        reason = ""
        for start in _starts(index, int(index.ticks_F[run[0]])):
            ticks = index.ticks_F[todo].tolist()
            num_found = 0
            reason = _MISSING
            try:
                decoded = _decoded_from(container, stream, start, frozenset(ticks))
                for frame in _matching(decoded, ticks, key_tick=start[1]):
                    yield frame
                    num_found += 1
            except _UnusableError as error:
                reason = str(error)
            except av.error.FFmpegError as error:
                reason = f"{_CORRUPT} ({lower_first(error.strerror)})"
            todo = todo[num_found:]
            if not todo:
                break
        if todo:
            raise _undecodable(index, todo[0], reason)


class _UnusableError(Exception):
    """What came out of the decoder cannot be taken; another starting point may do better."""


def _undecodable(index: VideoIndex, frame: int, reason: str) -> DecodeError:
    return DecodeError(
        index.path,
        f"frame {frame} of {index.num_frames} (at {index.seconds_F[frame]:.3f} s) cannot be decoded: {reason}",
    )


def _runs(index: VideoIndex, wanted: list[int]) -> list[list[int]]:
    """Cut the wanted frames where a seek to a keyframe saves decoding at least one frame."""
    runs = [[wanted[0]]]
    for before, frame in pairwise(wanted):
        key = bisect_right(index.key_ticks, int(index.ticks_F[frame])) - 1
        # A keyframe that follows `before` at once is reached by decoding on, without emptying the decoder.
        if key >= 0 and index.key_ticks[key] > index.ticks_F[before + 1]:
            runs.append([])
        runs[-1].append(frame)
    return runs


def _starts(index: VideoIndex, tick: int) -> list[tuple[int, int]]:
    """Where to start decoding for the frame at `tick`: (target of the seek, last keyframe to start at).

    First the last keyframe at or before it, by either timestamp, as containers differ in which one they seek
    by; then one before that and a second earlier at least, for streams whose keyframes need a run-up.
    """
    key = max(bisect_right(index.key_ticks, tick) - 1, 0)
    second = round(1.0 / index.seconds_per_tick)
    earlier = max(min(key - 1, bisect_right(index.key_ticks, index.key_ticks[key] - second) - 1), 0)
    starts = [
        (index.key_ticks[key], index.key_ticks[key]),
        (index.key_dts[key], index.key_ticks[key]),
        (index.key_dts[earlier], index.key_ticks[earlier]),
    ]
    return list(dict.fromkeys(starts))


def _decoded_from(
    container: InputContainer, stream: VideoStream, start: tuple[int, int], ticks: frozenset[int]
) -> Iterator[VideoFrame]:
    """Decode from a keyframe on, in presentation order; only pictures that nothing refers to are left out.

    Yields nothing when the seek lands behind the keyframe it is meant for.
    """
    target, key_tick = start
    container.seek(target, stream=stream, backward=True)
    # dav1d is told once, when it starts, what to leave out, and not packet by packet.
    others = "DEFAULT" if stream.codec_context.name == "libdav1d" else "NONREF"
    has_key = False
    for packet in container.demux(stream):
        if not has_key and packet.size:
            if not packet.is_keyframe:
                continue
            if packet.pts > key_tick:
                return
            has_key = True
        is_wanted = packet.pts is None or packet.pts in ticks
        stream.codec_context.skip_frame = "DEFAULT" if is_wanted else others
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            # Leading pictures of the keyframe refer to ones before it: they are not shown from here.
            if packet.pts is None or packet.pts >= key_tick:
                raise
            continue
        yield from frames


def _matching(frames: Iterator[VideoFrame], ticks: list[int], *, key_tick: int) -> Iterator[VideoFrame]:
    """The frames with these timestamps, up to the first that is missing. Raises _UnusableError."""
    place = 0
    previous: int | None = None
    for frame in frames:
        if previous is not None and frame.pts < previous:
            raise _UnusableError("the file's timestamps are not in presentation order; remux it")
        previous = frame.pts
        if frame.pts > ticks[place]:
            return
        # Damage spreads to the frames after it. Leading pictures of the keyframe lack what they refer to.
        if frame.is_corrupt and frame.pts >= key_tick:
            raise _UnusableError(_CORRUPT)
        if frame.pts < ticks[place]:
            continue
        yield frame
        place += 1
        if place == len(ticks):
            return


def _counted_frames(
    container: InputContainer, stream: VideoStream, index: VideoIndex, wanted: list[int]
) -> Iterator[VideoFrame]:
    """Decode from the first frame on and count, for files whose times do not tell the frames apart."""
    place = 0
    is_damaged = False
    try:
        for number, frame in enumerate(container.decode(stream)):
            is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)
            if number < wanted[place]:
                continue
            if is_damaged:
                raise _undecodable(index, number, _CORRUPT)
            yield frame
            place += 1
            if place == len(wanted):
                return
    except av.error.FFmpegError as error:
        raise _undecodable(index, wanted[place], f"{_CORRUPT} ({lower_first(error.strerror)})") from error
    raise _undecodable(index, wanted[place], _MISSING)


def _to_rgb(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """[H, W, 3] uint8, with the colour matrix and range that the file declares (BT.601 when it does not)."""
    return reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()


def _resize(rgb_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # A channels-last view: PyTorch has a vectorised path for it, several times faster than Pillow.
    pixels_1CHW = torch.from_numpy(rgb_HWC).permute(2, 0, 1).unsqueeze(0)
    resized_1CHW = torch.nn.functional.interpolate(
        pixels_1CHW, size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _turn(picture_HWC: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Turned after the resize, for which height and width were swapped: there is less to move."""
    if orientation.transpose:
        picture_HWC = picture_HWC.transpose(1, 0, 2)
    if orientation.mirror_x:
        picture_HWC = picture_HWC[:, ::-1]
    if orientation.mirror_y:
        picture_HWC = picture_HWC[::-1]
    return picture_HWC
