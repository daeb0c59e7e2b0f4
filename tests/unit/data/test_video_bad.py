"""The bad-input table: each broken video and the message its user gets."""

import re
import struct

import av
import numpy as np
import pytest
from video_files import SQUARE, cut_file, read_number, write_empty_video, write_sound, write_video

from megalong.config.tree import FrameSampling
from megalong.data.video import DecodeError, decode_frames, probe, select_frames


def select(path, num_frames):
    return select_frames(
        probe(path), sampling=FrameSampling.uniform, num_frames=num_frames, fps=1.0, max_frames=1, layout=SQUARE
    )


def _joined(folder):
    parts = [write_video(folder / name, 40, rate=25).read_bytes() for name in ("a.ts", "b.ts")]
    return _write(folder, b"".join(parts))


BAD_VIDEOS = {
    "missing": (lambda folder: folder / "none.mp4", "no such file or directory"),
    "a folder": (lambda folder: folder, "not a file"),
    "empty file": (lambda folder: _write(folder, b""), "the file is empty"),
    "text": (lambda folder: _write(folder, b"I am a film, honestly.\n" * 40), "not a video, or corrupt (invalid data"),
    "noise": (lambda folder: _write(folder, np.random.default_rng(0).bytes(20_000)), "not a video, or corrupt ("),
    "sound only": (lambda folder: write_sound(folder / "a.mp4"), "no video stream (it has audio streams)"),
    "no frames, mp4": (lambda folder: write_empty_video(folder / "a.mp4"), "no video stream (it has no streams)"),
    "no frames, avi": (lambda folder: write_empty_video(folder / "a.avi"), "zero frames: the video stream is empty"),
    "cut, index at the end": (lambda folder: _cut(folder, "mp4"), "not a video, or corrupt (invalid data"),
    "cut within a frame": (
        lambda folder: _cut(folder, "mp4", mux_options={"movflags": "faststart"}),
        "truncated: the file ends within frame ",
    ),
    "cut, fragmented": (
        lambda folder: _cut(folder, "mp4", mux_options={"movflags": "frag_keyframe+empty_moov"}),
        "truncated: the file ends within frame ",
    ),
    "cut, Matroska": (lambda folder: _cut(folder, "mkv"), "truncated: its header promises 4.8 s, the file ends after "),
    "cut, AVI": (lambda folder: _cut(folder, "avi"), "truncated: the file ends within frame "),
    "joined end to end": (_joined, "its timestamps run backwards (files joined end to end?); remux it"),
    "header only": (
        lambda folder: _cut_at(folder, b"mdat"),
        "truncated: its header lists 60 frames, the file ends after 0",
    ),
    "half a header": (lambda folder: _cut_at(folder, b"stbl"), "not a video, or corrupt (decoder not found)"),
    "no timestamps": (
        lambda folder: write_video(folder / "a.h264"),
        "frames without a time of their own; remux the file to MP4 or Matroska",
    ),
}


def _write(folder, data):
    path = folder / "a.mp4"
    path.write_bytes(data)
    return path


def _cut(folder, kind, *, keep=0.6, **settings):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(120)]
    whole = write_video(folder / f"whole.{kind}", 120, pictures=noise, **settings)
    return cut_file(whole, folder / f"cut.{kind}", keep=keep)


def _cut_at(folder, box):
    data = write_video(folder / "whole.mp4", 60, mux_options={"movflags": "faststart"}).read_bytes()
    return _write(folder, data[: data.index(box) + 4])


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_bad_video(tmp_path, case):
    make, message = BAD_VIDEOS[case]
    path = make(tmp_path)
    with pytest.raises(DecodeError, match=re.escape(f"{path}: {message}")) as caught:
        decode_frames(select(path, 8))
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"


def test_file_cut_between_frames(tmp_path):
    whole = write_video(tmp_path / "a.mp4", 60, mux_options={"movflags": "faststart"})
    with av.open(str(whole)) as container:
        end = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size][39]
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[:end])
    with pytest.raises(DecodeError, match="truncated: its header lists 60 frames, the file ends after 40"):
        probe(path)


@pytest.mark.parametrize("empty", [30, 59])
def test_an_empty_sample_is_not_a_frame_cut_off(tmp_path, empty):
    path = write_video(tmp_path / "a.mp4", 60, gop=1)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][empty]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from(">I", data, data.index(b"mdat") - 4)
    struct.pack_into(">I", data, data.index(b"mdat") - 4, length - size)
    struct.pack_into(">I", data, data.index(b"stsz") + 16 + 4 * empty, 0)
    del data[start : start + size]
    path.write_bytes(data)
    shown = [number for number in range(60) if number != empty]
    assert [read_number(picture) for picture in decode_frames(select(path, 60)).frames_FHWC] == shown
