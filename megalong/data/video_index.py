"""What is in a video file: the timestamps of its frames, read from the packets without decoding them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

# Every packet of these carries its own time of presentation.
_TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "mpegts", "asf")


def _unknown_side_data(kind: type[SideDataType], value: int) -> SideDataType:
    """FFmpeg attaches kinds (EXIF) that PyAV's enumeration lacks, which then refuses to list any of a frame's."""
    member = object.__new__(kind)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return kind._value2member_map_.setdefault(value, member)


SideDataType._missing_ = classmethod(_unknown_side_data)

_PacketFacts = tuple[int | None, int | None, bool, bool]  # pts, dts, is a keyframe, is shown


class DecodeError(Exception):
    """A video, or a frame of it, that cannot be decoded; becomes a Dropped record of stage "decode"."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return DecodeError, (self.path, self.reason)  # from the decoding process


@dataclass(frozen=True, kw_only=True, slots=True)
class Orientation:
    """How a stored picture is turned for display: transpose first, then the mirrors."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoIndex:
    """The frames of one file in presentation order. Arrays are [F] and read-only."""

    path: str
    ticks_F: np.ndarray  # int64; timestamp in the stream's time base, strictly ascending
    seconds_F: np.ndarray  # float64; presentation time relative to the first frame
    key_ticks: tuple[int, ...]  # timestamps of the keyframes, where decoding may start; ascending
    key_dts: tuple[int, ...]  # their decoding timestamps, which some containers seek by
    seconds_per_tick: float
    width: int  # pixels, as displayed: after the orientation is applied
    height: int
    orientation: Orientation
    counted: bool  # the file tells the frames' times but not which frame has which: decode in order and count

    @property
    def num_frames(self) -> int:
        return len(self.ticks_F)


def probe(path: str | os.PathLike[str]) -> VideoIndex:
    """Index a file from its packets; only its first picture is decoded, for size and orientation.

    The first video stream that is not a cover picture is taken. Left out: packets an edit list cuts off,
    and frames before the first keyframe. The result is kept per process while the file does not change.
    Raises DecodeError: no file, not a video, no video stream, no frames, no timestamps, cut short.
    """
    path = os.fspath(path)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DecodeError(path, lower_first(error.strerror or "cannot be read")) from error
    if not os.path.isfile(path):
        raise DecodeError(path, "not a file")
    if stat.st_size == 0:
        raise DecodeError(path, "the file is empty")
    return _probe(path, stat.st_size, stat.st_mtime_ns)


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


@contextmanager
def opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its video stream; whatever FFmpeg raises inside comes out as DecodeError."""
    try:
        with av.open(path) as container:
            pictures = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not pictures:
                kinds = sorted({stream.type for stream in container.streams}) or ["no"]
                raise DecodeError(path, f"no video stream (it has {', '.join(kinds)} streams)")
            yield container, pictures[0]
    except av.error.FFmpegError as error:
        raise DecodeError(path, f"not a video, or corrupt ({lower_first(error.strerror)})") from error


def _is_cover(stream: VideoStream) -> bool:
    return bool(stream.disposition & stream.disposition.attached_pic)


@lru_cache(maxsize=64)  # an hour at 30 frames/s is an index of 1.7 MB
def _probe(path: str, num_bytes: int, mtime_ns: int) -> VideoIndex:
    """The size and the time of change are there to tell one state of the file from another."""
    with opened(path) as (container, stream):
        packets: list[_PacketFacts] = []
        picture: VideoFrame | None = None
        is_cut = False
        for packet in container.demux(stream):
            if picture is None:
                picture = _first_or_none(packet)
            if packet.size and not _is_hidden(packet, stream):
                packets.append((packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
                is_cut = packet.is_corrupt
        _check_complete(container, stream, packets, is_cut=is_cut)
        if picture is None:
            raise DecodeError(path, f"none of its {len(packets)} frames can be decoded")
        orientation = _orientation(picture, path)
        across, down = picture.width, picture.height
        if orientation.transpose:
            across, down = down, across
        counted = _must_count(container, stream, packets)
        if "matroska" not in container.format.name:  # which stores none: FFmpeg's guess
            _check_order(packets, path)
        ticks_F, keys = (_counted_times(packets, path), []) if counted else _timeline(packets, path)
        seconds_per_tick = float(stream.time_base)
        seconds_F = (ticks_F - ticks_F[0]) * seconds_per_tick
    ticks_F.flags.writeable = seconds_F.flags.writeable = False
    return VideoIndex(
        path=path,
        ticks_F=ticks_F,
        seconds_F=seconds_F,
        key_ticks=tuple(tick for tick, _ in keys),
        key_dts=tuple(dts for _, dts in keys),
        seconds_per_tick=seconds_per_tick,
        width=across,
        height=down,
        orientation=orientation,
        counted=counted,
    )


def _first_or_none(packet: Packet) -> VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.error.InvalidDataError:
        return None  # a stream may start in the middle of a group of pictures


def _is_hidden(packet: Packet, stream: VideoStream) -> bool:
    """VP8's alternate reference frames are packets of their own, which show nothing (RFC 6386, 9.1)."""
    return stream.codec_context.codec.canonical_name == "vp8" and not bytes(packet)[0] & 0x10


def _check_order(packets: list[_PacketFacts], path: str) -> None:
    """Raise DecodeError where the times of decoding start again: one timestamp would mean two frames."""
    # What an edit list leaves out may come from before the cut.
    known = [dts for _, dts, _, is_shown in packets if dts is not None and is_shown]
    if any(later < earlier for earlier, later in pairwise(known)):
        raise DecodeError(path, "its timestamps run backwards (files joined end to end?); remux it")


def _must_count(container: InputContainer, stream: VideoStream, packets: list[_PacketFacts]) -> bool:
    """Whether a frame's timestamp, as the packets give it, cannot be trusted to find the frame again."""
    pts = [packet[0] for packet in packets]
    if None in pts:
        return True
    if container.format.name == "avi":
        # One time is stored per packet: of a codec that reorders frames, that of decoding. Only when FFmpeg's
        # parser could work out the order are the times not simply ascending.
        return bool(stream.codec_context.has_b_frames) and all(a < b for a, b in pairwise(pts))
    # Others may leave times out, which FFmpeg then guesses, and guesses differently after a seek.
    return container.format.name not in _TIMED_CONTAINERS


def _timeline(packets: list[_PacketFacts], path: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Timestamps [F] int64 of the shown frames in presentation order, and (pts, dts) of the keyframes."""
    keys = [(tick, tick if dts is None else dts) for tick, dts, is_key, _ in packets if is_key] or [
        (packets[0][0], packets[0][0] if packets[0][1] is None else packets[0][1])
    ]
    start = keys[0][0]  # what is shown before the first keyframe refers to pictures that are not in the file
    shown = [tick for tick, _, _, is_shown in packets if is_shown and tick >= start]
    if not shown:
        raise DecodeError(path, "zero frames: its edit list cuts off all of them")
    return np.unique(np.array(shown, dtype=np.int64)), sorted(keys)


def _counted_times(packets: list[_PacketFacts], path: str) -> np.ndarray:
    """Times [F] int64 of the frames, in order: those of decoding, sorted, differ from the shown by a constant."""
    times = [pts if dts is None else dts for pts, dts, _, _ in packets]
    if None in times or len(set(times)) < len(times):
        raise DecodeError(path, "frames without a time of their own; remux the file to MP4 or Matroska")
    if not packets[0][2]:
        raise DecodeError(path, "does not start with a keyframe, so that frames cannot be counted; remux the file")
    return np.sort(np.array(times, dtype=np.int64))


def _check_complete(
    container: InputContainer, stream: VideoStream, packets: list[_PacketFacts], *, is_cut: bool
) -> None:
    """Raise DecodeError for a file without frames, or one that ends before its header says."""
    if is_cut:
        raise DecodeError(container.name, f"truncated: the file ends within frame {len(packets) - 1}")
    if "mp4" in container.format.name:
        listed = sum(entry.size > 0 for entry in stream.index_entries)  # an empty sample is in no packet counted here
        if listed > len(packets):
            raise DecodeError(
                container.name, f"truncated: its header lists {listed} frames, the file ends after {len(packets)}"
            )
    if not packets:
        raise DecodeError(container.name, "zero frames: the video stream is empty")
    if "matroska" in container.format.name and container.duration:
        reached = max(packet[0] or 0 for packet in packets) * float(stream.time_base)
        promised = container.duration / av.time_base
        if reached + 1.0 < promised and _last_second(container) + 1.0 < promised:
            raise DecodeError(
                container.name,
                f"truncated: its header promises {promised:.1f} s, the file ends after {reached:.1f} s",
            )


def _last_second(container: InputContainer) -> float:
    """Where the longest stream ends: a video may well be shorter than its sound."""
    container.seek(0)
    return max(
        (float((packet.pts + (packet.duration or 0)) * packet.time_base) for packet in container.demux() if packet.pts),
        default=0.0,
    )


def _orientation(picture: VideoFrame, path: str) -> Orientation:
    """From the display matrix: x' = a x + c y, y' = b x + d y, in 16.16 fixed point, y downwards."""
    matrix = picture.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    largest = max(map(abs, (a, b, c, d)))
    if not largest:  # some muxers leave the field empty
        return Orientation()
    # Others compute it from sines: a quarter turn is then a few units off.
    a, b, c, d = (0 if abs(entry) * 100 < largest else entry for entry in (a, b, c, d))
    if a and d and not (b or c):
        return Orientation(mirror_x=a < 0, mirror_y=d < 0)
    if b and c and not (a or d):
        return Orientation(transpose=True, mirror_x=c < 0, mirror_y=b < 0)
    degrees = round(math.degrees(math.atan2(c, a)))
    raise DecodeError(path, f"its display matrix turns it by {degrees} degrees, expected quarter turns")
