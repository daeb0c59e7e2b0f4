"""B11: an hour of 1080p 30 fps H.264 to 3,600 frames at 448 px in host memory, by each decoder.

The hour is made here: a clip of moving noise with the frame number as a board of blocks, encoded once, its packets
repeated. Every candidate's numbers are read back from its frames before its time counts. Rows are printed, and written
to b11_decode.json in FOLDER, as they come; the videos stay there for the next run.

    python benchmarks/b11_decode.py FOLDER [--decoders nvcodec dali pyav ..] [--streams 1 7 14 21] [--limit 3600]

--decoders, in the order given (all of them by default):
nvcodec and dali: ours with N decoding streams, nvcodec_N and dali_N. trainer: what video.decoder=auto gives a training
run, in its process. pyav: pyav16, 16 threads, each a segment of the hour, and pyav1, one thread. dali_file: DALI on the
whole file, one stream, as its documentation shows it, at the hour's start and at its end (does it slow down?). small:
milliseconds for one short video after the other, of one size and of changing sizes, where a stream's fixed costs count;
the rule of video.decoder=auto stands on it.
One stream is timed on --part seconds of the hour, one thread and dali_file on a fifth of that, the others on --limit;
what is timed on a part is scaled to the hour, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch

from megalong.config.tree import VideoDecoder
from megalong.data.video import decode_frames, probe
from megalong.data.video_decoder import STREAMS, CpuFrameDecoder, GpuFrameDecoder, open_decoder
from megalong.records import FrameSelection

WIDTH, HEIGHT, FPS, SECONDS, SIZE = 1920, 1080, 30, 3600, 448
CLIP_SECONDS = 40
BITS, COLUMNS = 12, 4
PACKAGES = {
    "nvcodec": "PyNvVideoCodec", "trainer": "PyNvVideoCodec", "dali": "nvidia.dali", "dali_file": "nvidia.dali"
}  # fmt: skip
"""What a decoder needs to be installed; it is left out, in so many words, otherwise."""
DECODERS = ("nvcodec", "trainer", "dali", "pyav", "dali_file", "small")

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


def write_hour(clip: Path, path: Path, *, clip_seconds: int = CLIP_SECONDS, seconds: int = SECONDS) -> None:
    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [
            (bytes(packet), packet.pts, packet.dts, packet.is_keyframe)
            for packet in source.demux(stream)
            if packet.size
        ]
        span = round(clip_seconds / stream.time_base)
        for turn in range(seconds // clip_seconds):
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


def check(name: str, selection: FrameSelection, first: int, frames_FHWC: np.ndarray, *, clip_frames: int) -> None:
    """End the program unless the frames, from `first` on, show their numbers, which start again every `clip_frames`."""
    expected = [frame % clip_frames for frame in selection.frames[first : first + len(frames_FHWC)]]
    found = [number_of(picture) for picture in frames_FHWC]
    wrong = [place for place, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    if wrong:
        raise SystemExit(f"{name}: {len(wrong)} wrong frames, at {wrong[:5]}: {[found[i] for i in wrong[:5]]}")


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float  # for the hour
    timed: str


@dataclass(frozen=True, kw_only=True)
class Hour:
    """The long video, and how much of it is decoded: frames of the selection, one per second."""

    selection: FrameSelection
    clip_frames: int
    few: int  # of one thread
    part: int  # of one stream
    most: int  # of several

    def time(self, name: str, decode: Callable[[int, int], np.ndarray], *, first: int = 0, last: int) -> Row:
        """Decode frames [first, last) of the selection, check them, scale their seconds to all of it."""
        started = time.perf_counter()
        frames_FHWC = decode(first, last)  # on the host: nothing is queued on a GPU behind it
        seconds = time.perf_counter() - started
        check(name, self.selection, first, frames_FHWC, clip_frames=self.clip_frames)
        total = len(self.selection.frames)
        share = (last - first) / total
        row = Row(name, seconds / share, "all of it" if share == 1 else f"{last - first} s of {total}, scaled")
        print(f"{row.name:14} {row.seconds:8.1f} s  {total / row.seconds:8.0f} frames/s  {row.timed}", flush=True)
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


def small_videos(folder: Path, *, sizes: Sequence[tuple[int, int, int]]) -> Iterator[Row]:
    """Every fourth frame of a video of each size, four times; the median time of one, without its index."""
    videos = []
    for width, height, frames in sizes:
        path = folder / f"small_{width}x{height}_{frames}.mp4"
        write_clip(path, gop=250, crf=32, width=width, height=height, frames=frames)
        videos.append(choose(path, np.arange(0, frames, 4)))
    kinds = [kind for kind in ("dali", "nvcodec") if is_installed(kind)]
    for name in ("pyav1", *(f"{kind}_{STREAMS}" for kind in kinds)):
        decoder = CpuFrameDecoder() if name == "pyav1" else ours(name.split("_")[0], STREAMS)
        milliseconds: dict[str, list[float]] = {}
        orders = {"one size": [video for video in videos for _ in range(5)], "changing sizes": videos * 4}
        for order, sequence in orders.items():
            for place, video in enumerate(sequence):
                started = time.perf_counter()
                clip = decoder.decode(video, first=0, last=len(video.frames))
                spent = (time.perf_counter() - started) * 1e3
                check(name, video, 0, clip.frames_FHWC, clip_frames=len(video.frames) * 4)
                if order == "changing sizes" or place % 5:  # the first of one size finds the streams at another
                    milliseconds.setdefault(f"{order}, {Path(video.path).stem}", []).append(spent)
        if decoder.fallbacks:
            raise SystemExit(f"{name}: {decoder.fallbacks}")
        for what, spent in milliseconds.items():
            print(f"{name:14} {np.median(spent):8.1f} ms  {what}", flush=True)
            yield Row(name, float(np.median(spent)) / 1e3, what)
        decoder.close()


def rows_of(kind: str, hour: Hour, arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of one of DECODERS, as they come."""
    selection, total = hour.selection, len(hour.selection.frames)
    if kind == "small":
        yield from small_videos(arguments.folder, sizes=SMALL[:1] if arguments.tiny else SMALL)
    elif kind == "pyav":
        threads = min(16, os.cpu_count() or 1)
        yield hour.time(f"pyav{threads}", lambda _, last: pyav_threads(selection, last, threads), last=hour.most)
        one = lambda first, last: decode_frames(selection, first=first, last=last).frames_FHWC  # noqa: E731
        yield hour.time("pyav1", one, last=hour.few)
    elif kind == "dali_file":
        whole = lambda first, last: dali_file(selection, first, last)  # noqa: E731
        yield hour.time("dali_file", whole, last=hour.few)
        yield hour.time("dali_file_end", whole, first=total - hour.few, last=total)
    elif kind == "trainer":
        decoder = open_decoder(VideoDecoder.auto, torch.device("cuda", 0))
        decoder.probe(selection.path)
        decoder.decode(selection, first=0, last=min(hour.most, 32 * STREAMS))  # starts process and streams
        ready = lambda first, last: decoder.decode(selection, first=first, last=last).frames_FHWC  # noqa: E731
        yield hour.time("trainer", ready, last=hour.most)
        if decoder.fallbacks:
            raise SystemExit(f"trainer: {decoder.fallbacks}")
        decoder.close()
    else:
        for streams in arguments.streams:
            decoder, name = ours(kind, streams), f"{kind}_{streams}"
            decoder.decode(selection, first=0, last=min(hour.most, 32 * streams))  # starts the streams
            clip = lambda first, last, of=decoder: of.decode(selection, first=first, last=last).frames_FHWC  # noqa: E731
            row = hour.time(name, clip, last=hour.most if streams > 1 else hour.part)
            if decoder.fallbacks:
                raise SystemExit(f"{name}: {decoder.fallbacks}")
            decoder.close()
            yield row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--decoders", nargs="*", choices=DECODERS, default=DECODERS)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 7, 14, 21])
    parser.add_argument("--part", type=int, default=300, help="seconds of the hour that one stream decodes")
    parser.add_argument("--limit", type=int, default=SECONDS, help="seconds of the hour that several decode")
    parser.add_argument("--gop", type=int, default=250)
    parser.add_argument("--crf", type=int, default=32, help="32: about 3.5 Mbit/s; DALI takes no file over 2 GiB whole")
    parser.add_argument("--tiny", action="store_true", help="eight seconds of 320 x 180, to try the script on a CPU")
    arguments = parser.parse_args(argv)
    hour = make_hour(arguments)
    path = Path(hour.selection.path)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    report = {
        "device": gpu, "cores": os.cpu_count(), "torch": torch.__version__, "gop": arguments.gop,
        "bytes": path.stat().st_size,
    }  # fmt: skip
    rows: dict[str, list[Row]] = {}
    for kind in arguments.decoders:
        if not is_installed(kind):
            print(f"{kind}: {PACKAGES[kind]} is not installed")
            continue
        for row in rows_of(kind, hour, arguments):
            rows.setdefault(kind, []).append(row)
            text = json.dumps({**report, "rows": [vars(row) for part in rows.values() for row in part]}, indent=1)
            (arguments.folder / "b11_decode.json").write_text(text + "\n")
    print_ratios([row for kind, part in rows.items() if kind != "small" for row in part])


def make_hour(arguments: argparse.Namespace) -> Hour:
    """The video, which an earlier run may have made, and its selection."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    width, height, clip_seconds, seconds = (
        (320, 180, 2, 8) if arguments.tiny else (WIDTH, HEIGHT, CLIP_SECONDS, SECONDS)
    )
    path = arguments.folder / f"{seconds}s_gop{arguments.gop}_crf{arguments.crf}.mp4"
    if not path.is_file():
        started = time.perf_counter()
        clip = arguments.folder / "clip.mp4"
        options = {"gop": arguments.gop, "crf": arguments.crf, "width": width, "height": height}
        write_clip(clip, frames=clip_seconds * FPS, **options)
        write_hour(clip, path, clip_seconds=clip_seconds, seconds=seconds)
        print(
            f"made {path.name} ({path.stat().st_size / 1e9:.2f} GB) in {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    started = time.perf_counter()
    frames = np.arange(0, probe(path).num_frames, FPS)
    print(f"index of {probe(path).num_frames} frames: {time.perf_counter() - started:.1f} s (not in the times below)")
    most, part = min(arguments.limit, len(frames)), min(arguments.part, len(frames))
    return Hour(
        selection=choose(path, frames), clip_frames=clip_seconds * FPS, few=max(1, part // 5), part=part, most=most
    )  # fmt: skip


def print_ratios(rows: Sequence[Row]) -> None:
    """Ours with several streams against each baseline that was timed."""
    baselines = [row for row in rows if row.name.startswith(("pyav", "dali_file")) or row.name.endswith("_1")]
    for baseline in baselines:
        for row in rows:
            if row not in baselines:
                print(f"{row.name:14} {baseline.seconds / row.seconds:6.2f} x {baseline.name}")


def is_installed(kind: str) -> bool:
    try:
        return kind not in PACKAGES or find_spec(PACKAGES[kind]) is not None
    except ModuleNotFoundError:
        return False


def ours(kind: str, streams: int) -> GpuFrameDecoder:
    if kind == "dali":
        from megalong.data.video_dali import DaliDecoder as Decoder
    else:
        from megalong.data.video_nvcodec import NvCodecDecoder as Decoder
    return GpuFrameDecoder(torch.device("cuda", 0), lambda: Decoder(0), streams=streams)


if __name__ == "__main__":
    main()
