"""B11: an hour of 1080p 30 fps H.264 to 3,600 frames at 448 px in page-locked host memory, by each decoder.

The hour is made here: a clip of moving noise with the frame number as a board of blocks, encoded once, its packets
repeated. Every candidate's numbers are read back from its frames before its time counts. Writes b11_decode.json to
FOLDER, where the videos stay for the next run.

    python benchmarks/b11_decode.py FOLDER [--part 600] [--limit 3600] [--streams 1 7 14 21] [--skip pyav16 ..]

pyav1: one thread (part of the hour). pyav16: 16 threads, each a segment of the hour. dali_file: DALI on the whole file,
one stream, as its documentation shows it (part of the hour, at its start and at its end: does it slow down?).
dali_N and nvcodec_N: ours with N decoding streams. What is timed on a part is scaled to the hour, and says so.
small: milliseconds for one short video after the other, of one size and of changing sizes, where a stream's fixed costs
count; the rule of video.decoder=auto stands on it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch

from megalong.data.video import decode_frames, probe
from megalong.data.video_decoder import STREAMS, CpuFrameDecoder, FrameDecoder, GpuFrameDecoder
from megalong.records import FrameSelection

WIDTH, HEIGHT, FPS, SECONDS, SIZE = 1920, 1080, 30, 3600, 448
CLIP_SECONDS = 40
BITS, COLUMNS = 12, 4
BASELINES = ("pyav16", "pyav1", "dali_file", "dali_file_end", "dali_1", "nvcodec_1")


SMALL = ((64, 64, 32), (320, 240, 60), (320, 240, 420), (640, 360, 140), (1280, 720, 35), (1280, 720, 300))
"""Width, height and frames of the short videos."""


def board(number: int, *, width: int, height: int) -> np.ndarray:
    """[height, width] uint8: the number as 3 x 4 blocks, dark or light, over a texture that moves."""
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * COLUMNS // width
    bits = (number >> (rows[:, None] * COLUMNS + columns[None])) & 1
    return (bits * 150 + 40).astype(np.uint8)


def number_of(picture_HWC: np.ndarray) -> int:
    height, width, _ = picture_HWC.shape
    found = 0
    for bit in range(BITS):
        row, column = divmod(bit, COLUMNS)
        top, left = (2 * row + 1) * height // 6, (2 * column + 1) * width // 8
        found |= int(picture_HWC[top - 4 : top + 4, left - 4 : left + 4].mean() > 128) << bit
    return found


def write_clip(
    path: Path, *, gop: int, crf: int, width: int = WIDTH, height: int = HEIGHT, frames: int = CLIP_SECONDS * FPS,
    seed: int = 0,
) -> None:  # fmt: skip
    """H.264 with B-frames, all cores; every frame has other noise moving at its own speed."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 40, (height // 4 + 64, width // 4 + 64), np.uint8).repeat(4, 0).repeat(4, 1)
    chroma = np.full((height // 2, width), 128, np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": str(crf), "g": str(gop), "sc_threshold": "0", "bf": "3"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            down, across = (3 * number) % 256, (5 * number) % 256
            luma = board(number, width=width, height=height) + noise[down : down + height, across : across + width]
            planes = np.concatenate([luma, chroma])
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_hour(clip: Path, path: Path, *, clip_seconds: int = CLIP_SECONDS) -> None:
    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [
            (bytes(packet), packet.pts, packet.dts, packet.is_keyframe)
            for packet in source.demux(stream)
            if packet.size
        ]
        span = round(clip_seconds / stream.time_base)
        for turn in range(SECONDS // clip_seconds):
            for data, pts, dts, is_key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts = pts + turn * span, dts + turn * span
                packet.time_base, packet.stream, packet.is_keyframe = stream.time_base, copy, is_key
                target.mux_one(packet)


def choose(path: Path, frames: np.ndarray) -> FrameSelection:
    index = probe(path)
    return FrameSelection(
        path=str(path), frames=tuple(frames.tolist()), seconds=tuple(index.seconds_F[frames].tolist()),
        height=SIZE, width=SIZE,
    )  # fmt: skip


def check(name: str, selection: FrameSelection, first: int, frames_FHWC: np.ndarray) -> None:
    expected = [frame % (CLIP_SECONDS * FPS) for frame in selection.frames[first : first + len(frames_FHWC)]]
    found = [number_of(picture) for picture in frames_FHWC]
    wrong = [place for place, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    if wrong:
        raise SystemExit(f"{name}: {len(wrong)} wrong frames, at {wrong[:5]}: {[found[i] for i in wrong[:5]]}")


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float  # for the hour
    timed: str


def timed(name: str, selection: FrameSelection, decode: Callable[[], tuple[int, np.ndarray]], *, share: float) -> Row:
    """Decode, check, and scale what is `share` of the hour."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    first, frames_FHWC = decode()
    seconds = time.perf_counter() - started
    check(name, selection, first, frames_FHWC)
    row = Row(name, seconds / share, "whole hour" if share == 1 else f"{share * 60:.0f} min, scaled")
    print(f"{row.name:12} {row.seconds:8.1f} s  {len(selection.frames) / row.seconds:8.0f} frames/s  {row.timed}")
    return row


def pyav_threads(selection: FrameSelection, last: int, threads: int) -> np.ndarray:
    """Frames [0, last) cut in 4 x `threads` ranges, PyAV on each with one thread: it leaves the interpreter lock."""
    edges = np.linspace(0, last, 4 * threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        ranges = zip(edges[:-1], edges[1:], strict=True)
        clips = pool.map(lambda part: decode_frames(selection, first=part[0], last=part[1]).frames_FHWC, ranges)
        return np.concatenate(list(clips))


def dali_file(selection: FrameSelection, first: int, last: int) -> np.ndarray:
    """One stream of plain DALI: the whole file, frame numbers, DALI's own resize; 64 frames to a call."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=0, prefetch_queue_depth=1, exec_dynamic=True)
    def graph() -> object:
        file = fn.external_source(name="file", dtype=types.UINT8, ndim=1, no_copy=True)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        video = fn.decoders.video(file, frames=frames, device="mixed", affine=False)
        return fn.resize(video, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC, antialias=True)

    pipeline = graph()
    pipeline.build()
    data = np.fromfile(selection.path, np.uint8)
    parts = []
    for place in range(first, last, 64):
        pipeline.feed_input("file", [data])
        pipeline.feed_input("frames", [np.array(selection.frames[place : min(place + 64, last)], np.int32)])
        (output,) = pipeline.run()
        parts.append(torch.from_dlpack(output[0]).cpu().numpy())
    return np.concatenate(parts)


def small_videos(folder: Path, decoders: dict[str, FrameDecoder]) -> list[Row]:
    """Every fourth frame of a video of each of SMALL, four times; the median time of one, without its index."""
    videos = []
    for width, height, frames in SMALL:
        path = folder / f"small_{width}x{height}_{frames}.mp4"
        write_clip(path, gop=250, crf=32, width=width, height=height, frames=frames)
        videos.append(choose(path, np.arange(0, frames, 4)))
    rows = []
    for name, decoder in decoders.items():
        milliseconds: dict[str, list[float]] = {}
        orders = {"one size": [video for video in videos for _ in range(5)], "changing sizes": videos * 4}
        for order, sequence in orders.items():
            for place, video in enumerate(sequence):
                started = time.perf_counter()
                clip = decoder.decode(video, first=0, last=len(video.frames))
                spent = (time.perf_counter() - started) * 1e3
                check(name, video, 0, clip.frames_FHWC)
                if order == "changing sizes" or place % 5:  # the first of one size finds the streams at another
                    milliseconds.setdefault(f"{order}, {Path(video.path).stem}", []).append(spent)
        if decoder.fallbacks:
            raise SystemExit(f"{name}: {decoder.fallbacks}")
        for what, spent in milliseconds.items():
            print(f"{name:12} {np.median(spent):8.1f} ms  {what}")
            rows.append(Row(name, float(np.median(spent)) / 1e3, what))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", type=int, default=300, help="seconds of the hour that slow candidates decode")
    parser.add_argument("--limit", type=int, default=SECONDS, help="seconds of the hour that the others decode")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 7, 14, 21])
    parser.add_argument("--gop", type=int, default=250)
    parser.add_argument("--crf", type=int, default=32, help="32: about 3.5 Mbit/s; DALI takes no file over 2 GiB whole")
    parser.add_argument("--skip", nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    hour = arguments.folder / f"hour_gop{arguments.gop}_crf{arguments.crf}.mp4"
    if not hour.is_file():
        started = time.perf_counter()
        write_clip(arguments.folder / "clip.mp4", gop=arguments.gop, crf=arguments.crf)
        write_hour(arguments.folder / "clip.mp4", hour)
        print(f"made {hour.name} ({hour.stat().st_size / 1e9:.2f} GB) in {time.perf_counter() - started:.0f} s")
    started = time.perf_counter()
    frames = np.arange(0, probe(hour).num_frames, FPS)
    print(f"index of {probe(hour).num_frames} frames: {time.perf_counter() - started:.1f} s (not in the times below)")
    selection = choose(hour, frames)
    part, total = arguments.part, len(frames)
    rows: list[Row] = []

    def is_skipped(name: str) -> bool:
        return name in arguments.skip or name.rstrip("0123456789") in arguments.skip

    def run(name: str, decode: Callable[[], tuple[int, np.ndarray]], *, share: float) -> None:
        if not is_skipped(name):
            rows.append(timed(name, selection, decode, share=share))

    few, most = part // 5, min(arguments.limit, total)
    run("pyav1", lambda: (0, decode_frames(selection, first=0, last=few).frames_FHWC), share=few / total)
    run("pyav16", lambda: (0, pyav_threads(selection, most, min(16, os.cpu_count() or 1))), share=most / total)
    for kind, package in (("dali_", "nvidia.dali"), ("nvcodec_", "PyNvVideoCodec")):
        if not is_installed(package) or kind in arguments.skip:
            print(f"{kind}: {package} is not installed, or skipped")
            continue
        for streams in arguments.streams:
            if is_skipped(f"{kind}{streams}"):
                continue
            share = (most if streams > 1 else part) / total
            decoder = ours(kind, streams)
            decoder.decode(selection, first=0, last=min(most, 32 * streams))  # starts the streams
            run(
                f"{kind}{streams}",
                lambda decoder=decoder, share=share: (
                    0,
                    decoder.decode(selection, first=0, last=round(total * share)).frames_FHWC,
                ),
                share=share,
            )
            if decoder.fallbacks:
                raise SystemExit(f"{kind}{streams}: {decoder.fallbacks}")
            decoder.close()
        if kind == "dali_" and "dali_file" not in arguments.skip:
            run("dali_file", lambda: (0, dali_file(selection, 0, few)), share=few / total)
            run("dali_file_end", lambda: (total - few, dali_file(selection, total - few, total)), share=few / total)
    for baseline in [row for row in rows if row.name in BASELINES]:
        for row in rows:
            if row.name.startswith(("dali_", "nvcodec_")) and row.name not in BASELINES:
                print(f"{row.name:12} {baseline.seconds / row.seconds:6.2f} x {baseline.name}")
    if "small" not in arguments.skip:
        decoders: dict[str, FrameDecoder] = {"pyav1": CpuFrameDecoder()}
        for kind, package in (("dali_", "nvidia.dali"), ("nvcodec_", "PyNvVideoCodec")):
            if is_installed(package) and kind not in arguments.skip:
                decoders[f"{kind}{STREAMS}"] = ours(kind, STREAMS)
        rows += small_videos(arguments.folder, decoders)
        for decoder in decoders.values():
            decoder.close()
    report = {
        "gpu": torch.cuda.get_device_name(), "cores": os.cpu_count(), "torch": torch.__version__, "gop": arguments.gop,
        "bytes": hour.stat().st_size, "rows": [vars(row) for row in rows],
    }  # fmt: skip
    (arguments.folder / "b11_decode.json").write_text(json.dumps(report, indent=1) + "\n")


def is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def ours(kind: str, streams: int) -> GpuFrameDecoder:
    if kind == "dali_":
        from megalong.data.video_dali import DaliDecoder as Decoder
    else:
        from megalong.data.video_nvcodec import NvCodecDecoder as Decoder
    return GpuFrameDecoder(torch.device("cuda", 0), lambda: Decoder(0), streams=streams)


if __name__ == "__main__":
    main()
