"""Which packets of a file a decoder needs for which frames: the plan of decoding one file in parallel segments.

Everything here runs on the CPU and decodes nothing. A segment is a run of wanted frames and the packets they need,
from a keyframe on: no packet before it, none behind the last wanted frame of a group of pictures, and none that
neither is wanted nor is referred to.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import TypeVar

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.packet import Packet
from av.video.stream import VideoStream

from megalong.data.video_index import VideoIndex, opened

_NAL_CODECS = ("h264", "hevc")
_PIXELS = ("yuv420p", "yuvj420p", "yuv420p10le")
_BT709, _BT2020 = 1, 9  # AVColorSpace
_FULL_RANGE = 2  # AVColorRange
_FULL = re.compile(
    r"(?i)out.of.memory|(error code : |returned error )2\b|CUDA allocation failed|can't allocate \d+ bytes on device"
)
"""How PyNvVideoCodec (2 is the driver's code for it, all that NVDEC's calls give) and DALI say that a GPU is full."""
_FRAME_MS = 40  # between two frames of a remuxed segment

Converted = TypeVar("Converted")


class RefusedError(Exception):
    """A file that the GPU path does not take; PyAV decodes it instead."""


def refusal(library: str, reason: str) -> RefusedError | torch.OutOfMemoryError:
    """What to raise for a library's error: a GPU without memory says nothing about the file."""
    return (torch.OutOfMemoryError if _FULL.search(reason) else RefusedError)(f"{library}: {reason}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Coding:
    """What a decoder must know about a video stream beside its packets."""

    codec: str  # FFmpeg's name
    width: int  # pixels, as stored
    height: int
    bits: int  # per sample
    matrix: str  # "bt601" (also where the file does not say), "bt709" or "bt2020"
    full_range: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Wanted frames of one file that are decoded together."""

    first: int  # place of frames[0] among all wanted frames
    frames: tuple[int, ...]  # indexes in presentation order, ascending


def plan_segments(index: VideoIndex, wanted: Sequence[int], *, aim: int, most_frames: int) -> list[Segment]:
    """Cut the wanted frames (ascending) into segments of about `aim` and at most `most_frames` of them, at keyframes.

    Only a group of pictures that alone has more wanted frames than `most_frames` is cut inside; its first part is
    decoded again for each further one.
    """
    groups: list[list[int]] = []
    last_key = None
    for frame in wanted:
        key = bisect_right(index.key_ticks, int(index.ticks_F[frame]))
        if key != last_key:
            groups.append([])
        groups[-1].append(frame)
        last_key = key
    runs: list[list[int]] = []
    for group in groups:
        if not runs or len(runs[-1]) + len(group) > aim:
            runs.append([])
        runs[-1] += group
    parts = [tuple(run[start : start + most_frames]) for run in runs for start in range(0, len(run), most_frames)]
    firsts = accumulate((len(part) for part in parts), initial=0)
    return [Segment(first=first, frames=part) for first, part in zip(firsts, parts, strict=False)]


def num_decoded(index: VideoIndex, wanted: Sequence[int]) -> int:
    """Frames from the keyframe of each group of pictures to its last wanted one: about what must be decoded."""
    last_of = {bisect_right(index.key_ticks, int(index.ticks_F[frame])): frame for frame in wanted}
    starts = {key: int(np.searchsorted(index.ticks_F, index.key_ticks[key - 1])) if key else 0 for key in last_of}
    return sum(last - starts[key] + 1 for key, last in last_of.items())


def read_coding(index: VideoIndex) -> Coding:
    """Raises RefusedError for streams that a hardware decoder does not decode, or not to the same pictures."""
    with opened(index.path) as (_, stream):
        context = stream.codec_context
        codec, pixels, order = stream.codec_context.codec.canonical_name, context.pix_fmt, context.field_order
        coding = Coding(
            codec=codec,
            width=context.width,
            height=context.height,
            bits=10 if pixels == "yuv420p10le" else 8,
            matrix={_BT709: "bt709", _BT2020: "bt2020"}.get(int(context.colorspace), "bt601"),
            full_range=int(context.color_range) == _FULL_RANGE or pixels == "yuvj420p",
        )
    if index.counted:
        raise RefusedError("its frames have no times of their own and must be counted from the start")
    if codec not in ("h264", "hevc", "vp9", "av1"):
        raise RefusedError(f"codec {codec}")
    if pixels not in _PIXELS or (codec == "h264" and pixels == "yuv420p10le"):
        raise RefusedError(f"pixel format {pixels} in {codec}")
    if coding.width % 2 or coding.height % 2:
        raise RefusedError(f"odd size {coding.width} x {coding.height}")
    if order not in (0, 1):
        raise RefusedError("interlaced")
    return coding


def read_segment(
    index: VideoIndex, segment: Segment, convert: Callable[[VideoStream, list[Packet]], Converted]
) -> Converted:
    """The packets a segment needs, in decoding order, as `convert` makes them ready for a decoder.

    Raises RefusedError when they cannot be told (no keyframe to start at, damaged packets), DecodeError as `opened`.
    """
    ticks = [int(tick) for tick in index.ticks_F[list(segment.frames)]]
    key = bisect_right(index.key_ticks, ticks[0]) - 1
    if key < 0:
        raise RefusedError(f"no keyframe before frame {segment.frames[0]}")
    with opened(index.path) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        for target in dict.fromkeys((index.key_ticks[key], index.key_dts[key])):
            container.seek(target, stream=stream, backward=True)
            packets = _packets_from(container.demux(stream), index.key_ticks[key], set(ticks))
            if packets:
                break
        else:
            raise RefusedError(f"a seek does not reach the keyframe before frame {segment.frames[0]}")
        facts = [_facts(codec, stream, packet) for packet in packets]
        return convert(stream, [packets[place] for place in needed_packets(facts, set(ticks))])


@dataclass(frozen=True, kw_only=True, slots=True)
class PacketFacts:
    """What decides whether a packet is needed."""

    tick: int
    is_key: bool
    is_reference: bool  # pictures of its temporal layer may be predicted from it
    layer: int = 0  # temporal layer; pictures of higher ones may be predicted from any of a lower one


def needed_packets(facts: Sequence[PacketFacts], ticks: set[int]) -> list[int]:
    """Places of the packets, given in decoding order from a keyframe on, that the frames at `ticks` need.

    A group of pictures is a keyframe and what follows it up to the next. Its leading pictures (shown before the
    keyframe) may refer to the group before it, other pictures may not.
    """
    top = max(packet.layer for packet in facts)
    starts = [place for place, packet in enumerate(facts) if packet.is_key]
    ends = [*starts[1:], len(facts)]
    needed: list[int] = []
    next_leads = False  # a leading picture of the next group is wanted
    for start, end in reversed(list(zip(starts, ends, strict=True))):
        key_tick = facts[start].tick
        wanted = [place for place in range(start, end) if facts[place].tick in ticks]
        leads = start > 0 and any(facts[place].tick < key_tick for place in wanted)
        last = end - 1 if next_leads else max(wanted, default=start - 1)
        needed += [
            place
            for place in range(last, start - 1, -1)
            if facts[place].tick in ticks
            or ((facts[place].is_reference or facts[place].layer < top) and (leads or facts[place].tick >= key_tick))
        ]
        next_leads = leads
    return needed[::-1]


def _packets_from(demuxed: Iterable[Packet], key_tick: int, ticks: set[int]) -> list[Packet]:
    """Packets from the keyframe at key_tick to the last wanted one; none when the keyframe was passed already."""
    packets: list[Packet] = []
    missing = set(ticks)
    for packet in demuxed:
        if not packet.size:
            continue
        if not packets:
            if packet.is_keyframe and packet.pts is not None and packet.pts > key_tick:
                return []
            if not packet.is_keyframe or packet.pts != key_tick:
                continue
        if packet.pts is None or packet.is_corrupt:
            raise RefusedError("a packet without a time, or damaged")
        packets.append(packet)
        missing.discard(packet.pts)
        if not missing:
            return packets
    return []


def _facts(codec: str, stream: VideoStream, packet: Packet) -> PacketFacts:
    is_key, tick = bool(packet.is_keyframe), packet.pts
    if codec not in _NAL_CODECS:
        return PacketFacts(tick=tick, is_key=is_key, is_reference=True)
    pictures = [unit for unit in map(_PICTURES[codec], _nals(codec, stream, bytes(packet))) if unit is not None]
    if not pictures:
        raise RefusedError(f"a packet without a picture (tick {tick})")
    if is_key and not all(unit.is_random_access for unit in pictures):
        raise RefusedError("keyframes that are no random access points (intra refresh, or recovery points)")
    return PacketFacts(
        tick=tick,
        is_key=is_key,
        is_reference=any(unit.is_reference for unit in pictures),
        layer=max(unit.layer for unit in pictures),
    )


def _nals(codec: str, stream: VideoStream, data: bytes) -> list[bytes]:
    """The first two bytes of each unit of a packet. Raises RefusedError when their lengths do not add up."""
    extra = stream.codec_context.extradata or b""
    heads: list[bytes] = []
    if extra[:1] == b"\x01":  # length-prefixed, as in MP4 and Matroska
        size = (extra[4] if codec == "h264" else extra[21]) % 4 + 1
        place = 0
        while place < len(data):
            length = int.from_bytes(data[place : place + size], "big")
            if length < 2 or place + size + length > len(data):
                raise RefusedError("a packet whose parts do not add up")
            heads.append(data[place + size : place + size + 2])
            place += size + length
        return heads
    place = data.find(b"\x00\x00\x01")
    while place >= 0:
        heads.append(data[place + 3 : place + 5])
        place = data.find(b"\x00\x00\x01", place + 3)
    return heads


@dataclass(frozen=True, slots=True)
class _Picture:
    """What the head of a unit with picture data says."""

    is_random_access: bool
    is_reference: bool
    layer: int


def _h264_picture(head: bytes) -> _Picture | None:
    kind = head[0] & 31
    return _Picture(kind == 5, bool(head[0] & 0x60), 0) if 1 <= kind <= 5 else None


def _hevc_picture(head: bytes) -> _Picture | None:
    kind = head[0] >> 1 & 63
    # Of the types below 16 the even ones are not referred to within their temporal layer.
    return _Picture(16 <= kind <= 21, kind >= 16 or kind % 2 == 1, (head[1] & 7) - 1) if kind < 32 else None


_PICTURES: dict[str, Callable[[bytes], _Picture | None]] = {"h264": _h264_picture, "hevc": _hevc_picture}


@dataclass(frozen=True, kw_only=True, slots=True)
class CodedFrame:
    """One packet, H.264 and HEVC as a byte stream with start codes and parameter sets."""

    tick: int
    data: bytes


def as_byte_stream(stream: VideoStream, packets: Sequence[Packet]) -> list[CodedFrame]:
    """For decoders that are fed packet by packet."""
    codec = stream.codec_context.codec.canonical_name
    ticks = [packet.pts for packet in packets]
    if codec not in _NAL_CODECS:
        return [CodedFrame(tick=tick, data=bytes(packet)) for tick, packet in zip(ticks, packets, strict=True)]
    add_start_codes = BitStreamFilterContext(f"{codec}_mp4toannexb", stream)
    data = [b"".join(bytes(part) for part in add_start_codes.filter(packet)) for packet in packets]
    return [CodedFrame(tick=tick, data=part) for tick, part in zip(ticks, data, strict=True)]


def as_matroska(stream: VideoStream, packets: Sequence[Packet]) -> tuple[bytes, list[int]]:
    """A file in memory for decoders that take files, and the ticks of its frames in presentation order.

    Its frames are evenly spaced, whatever their times were.
    """
    ticks = sorted(packet.pts for packet in packets)
    place_of = {tick: place for place, tick in enumerate(ticks)}
    delay = max(place - place_of[packet.pts] for place, packet in enumerate(packets))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        copy = container.add_stream_from_template(stream, opaque=True)  # of AV1 the wheels have no encoder of that name
        for place, packet in enumerate(packets):
            packet.pts, packet.dts = place_of[packet.pts] * _FRAME_MS, (place - delay) * _FRAME_MS
            packet.duration, packet.time_base, packet.stream = _FRAME_MS, Fraction(1, 1000), copy
            container.mux_one(packet)
    return file.getvalue(), ticks
