"""`megalong cache-embeddings`: fill video.cache_dir ahead of training, its videos shared out over the processes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from megalong.config.tree import RunConfig
from megalong.engine.build import build_encoder, family_of
from megalong.engine.checkpoint import load_encoder_weights, newest_checkpoint
from megalong.evaluating import eval_samples
from megalong.metrics import DROPPED_FILE, PhaseTimer
from megalong.parallel.collectives import gather_objects
from megalong.parallel.layout import ParallelLayout, make_layout
from megalong.records import Dropped, FrameSelection, Sample
from megalong.run import checked_shape, read_samples
from megalong.videos import check_store, frame_chooser, open_vision
from megalong.vision.encode import VisionStage

ROUND = 4
"""Videos of each process after which all meet: none waits for another for longer than a phase may last."""


@dataclass(kw_only=True)
class Filled:
    """What one process, or all of them, did."""

    encoded: int = 0  # videos
    found: int = 0  # videos that were there, whole
    on_cpu: int = 0  # videos that the chosen decoder refused, so that PyAV decoded them
    refused: int = 0  # files of the store
    bytes_written: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    unreadable: int = 0  # videos

    def __add__(self, other: Filled) -> Filled:
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        sums = {name: mine[name] + theirs[name] for name in mine if name != "dropped"}
        return Filled(**sums, dropped=[*self.dropped, *other.dropped])


def cache_embeddings(config: RunConfig, timer: PhaseTimer | None = None) -> Filled:
    """Decode and encode every video of data.train and eval.manifest that the disk store does not hold whole.

    Each process takes videos of its own, whole: start as many as there are GPUs (torchrun), whatever the layout of the
    training. Started again, it goes on where it was ended. Samples with a video that cannot be read are written to
    <video.cache_dir>/dropped.jsonl. Returns the totals of all processes.
    """
    started, since = time.perf_counter(), time.time()
    checked_shape(config, task="cache-embeddings")
    samples = read_samples(config, manifest=config.data.train, video_dir=config.data.video_dir, thinking_targets=False)
    samples += eval_samples(config) if config.eval.manifest else []
    check_store(config)
    layout = make_layout(tp=1, cp=1, pp=1, seed=config.seed, timeout_minutes=config.parallel.timeout_minutes)
    encoder, spec = build_encoder(config.model, layout)
    if config.model.init_from:
        load_encoder_weights(newest_checkpoint(Path(config.model.init_from)), encoder)
    tokens = family_of(config.model).read_tokens(Path(config.model.path))
    with open_vision(config, layout, encoder, spec=spec, tokens=tokens) as vision:
        vision.embeds.disk.keep_since = since
        if layout.is_main:
            vision.embeds.disk.sweep()
        total = fill(vision, config, samples, layout, timer or PhaseTimer())
    if layout.is_main:
        write_dropped(Path(config.video.cache_dir), total.dropped)
        tqdm.write(summary(total, config.video.cache_dir, seconds=time.perf_counter() - started))
    return total


def fill(
    vision: VisionStage, config: RunConfig, samples: Sequence[Sample], layout: ParallelLayout, timer: PhaseTimer
) -> Filled:
    """All videos of the samples, every process a share of them, the next data.decode_workers fetched ahead."""
    users: dict[str, list[Sample]] = {}
    for sample in samples:
        for path in sample.videos:
            users.setdefault(path, []).append(sample)
    mine = sorted(users)[layout.rank :: layout.world_size]
    choose = frame_chooser(config, vision.videos)
    done = Filled()
    ahead: dict[str, tuple[dict[str, FrameSelection], list[Dropped]]] = {}
    bar = tqdm(total=len(users), desc="videos", disable=not layout.is_main, unit="video", dynamic_ncols=True)
    for first in range(0, -(-len(users) // layout.world_size), ROUND):
        with timer.during("cache"):
            for at in range(first, min(first + ROUND, len(mine))):
                for path in mine[at : at + 1 + config.data.decode_workers]:
                    if path not in ahead:
                        ahead[path] = vision.select([alone(users[path][0], path)], choose)
                # All, in the order of their turns: what had no room before comes first.
                vision.prefetch([item for found, _ in ahead.values() for item in found.values()])
                selections, dropped = ahead.pop(mine[at])
                _fill_one(vision, users[mine[at]], mine[at], selections, dropped, done=done)
            bar.update(sum(gather_objects(len(mine[first : first + ROUND]), group=layout.world)))
    bar.close()
    done.on_cpu = len(vision.decoded_elsewhere)
    done.refused, done.bytes_written = len(vision.embeds.disk.refused), vision.embeds.disk.bytes_written
    return sum(gather_objects(done, group=layout.world), start=Filled())


def _fill_one(
    vision: VisionStage, users: Sequence[Sample], path: str, selections: dict[str, FrameSelection],
    dropped: Sequence[Dropped], *, done: Filled,
) -> None:  # fmt: skip
    """One video, which may have been dropped already. users: the samples that have it. Counts in `done`."""
    vision.release()
    before = vision.frames_encoded
    dropped = dropped or vision.prepare([alone(users[0], path)], selections)
    if dropped:
        done.unreadable += 1
        done.dropped += [dataclasses.replace(dropped[0], sample_id=user.sample_id) for user in users]
        return
    done.encoded += vision.frames_encoded > before
    done.found += vision.frames_encoded == before
    vision.embeds.save(vision.embed_key(selections[path]))


def alone(sample: Sample, path: str) -> Sample:
    """The sample with one of its videos."""
    return dataclasses.replace(sample, videos=(path,))


def write_dropped(folder: Path, dropped: Sequence[Dropped]) -> None:
    rows = [json.dumps(dataclasses.asdict(drop), ensure_ascii=False) for drop in dropped]
    (folder / DROPPED_FILE).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def summary(total: Filled, folder: str | None, *, seconds: float) -> str:
    videos = total.encoded + total.found + total.unreadable
    cpu = f" ({total.on_cpu} decoded on the CPU, as the GPU's decoder refused them)" if total.on_cpu else ""
    return (
        f"{folder}: {videos} videos, {total.encoded} encoded{cpu}, {total.found} there already, {total.unreadable} "
        f"unreadable ({len(total.dropped)} samples, see {DROPPED_FILE}), {total.refused} damaged files replaced, "
        f"{total.bytes_written / 2**30:.2f} GiB written in {seconds:.0f} s"
    )
