"""Embeddings on disk: filled by any number of processes, resumed after a kill, read by training at any layout."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import FROZEN_VISION, DemoWorld, World, run_world
from recorded_runs import Recorded, recording

from megalong.cache_embeddings import Filled, cache_embeddings
from megalong.sft import train_sft
from megalong.vision import disk

ONE_BATCH = "video.cache_gib=0.0000065"
"""Host memory for the shares of a batch of 4 videos on one of 2 ranks, and not for 5."""


def config_of(demo: DemoWorld, folder: Path, overrides: Sequence[str]) -> object:
    cache = f"video.cache_dir={folder / 'cache'}"
    return demo.config(folder / "run", *FROZEN_VISION, cache, *overrides, task="sft")


def fill(demo: DemoWorld, folder: Path, overrides: Sequence[str] = (), *, kill_at: int = 0) -> Filled:
    """kill_at: which file is killed before it gets its name; 0: none."""
    written = 0
    replace = os.replace

    def counted(*paths: Path) -> None:
        nonlocal written
        written += 1
        if written == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    disk.os.replace = counted
    return cache_embeddings(config_of(demo, folder, overrides))


def train(demo: DemoWorld, folder: Path, overrides: Sequence[str]) -> tuple[list[float], int]:
    """Losses, and frames that this rank encoded."""
    recorded = Recorded()
    with recording(recorded, None):
        train_sft(config_of(demo, folder, overrides))
    return [stats.loss for stats in recorded.stats], recorded.frames_encoded


@pytest.fixture(scope="module")
def losses(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of a run of one process without a disk store."""
    folder = tmp_path_factory.mktemp("alone")
    ((found, frames),) = run_world(1, train, demo, folder, ("video.cache_dir=null",), folder=folder / "processes")
    assert frames == 8 * 5
    return found


@pytest.fixture(scope="module")
def filled(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that two processes filled, after two others were killed in the middle of their third file."""
    folder = tmp_path_factory.mktemp("filled")
    world = World(2, _killed_at_third, demo, folder, folder=folder / "killed")
    assert world.exit_codes() == [-signal.SIGKILL] * 2, world.log()
    names = [path.suffix for path in (folder / "cache").rglob("*") if path.is_file()]
    assert sorted(names) == [".partial"] * 2 + [".safetensors"] * 4
    done = run_world(2, fill, demo, folder, folder=folder / "resumed")
    assert done[0] == done[1]
    assert (done[0].encoded, done[0].found, done[0].unreadable, done[0].refused) == (4, 4, 0, 0)
    assert (folder / "cache" / "dropped.jsonl").read_text() == ""
    return folder


def _killed_at_third(demo: DemoWorld, folder: Path) -> Filled:
    return fill(demo, folder, kill_at=3)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, ()),
        (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
        (2, ("parallel.cp=2", "mr_sp.mode=stage1")),
        (2, ()),  # two replicas
        (4, ("parallel.pp=2", "parallel.cp=2")),
    ],
    ids=["alone", "tp2", "cp2_stage1", "dp2", "pp2_cp2"],
)
def test_training_reads_what_another_layout_wrote(
    demo: DemoWorld, filled: Path, losses: list[float], tmp_path: Path, size: int, overrides: tuple[str, ...]
) -> None:
    (tmp_path / "cache").symlink_to(filled / "cache")
    for found, frames in run_world(size, train, demo, tmp_path, overrides, folder=tmp_path / "processes"):
        assert found == pytest.approx(losses, rel=1e-5)
        assert frames == 0, "every embedding came from disk"


def test_training_writes_what_has_no_room_and_another_layout_reads_it(
    demo: DemoWorld, losses: list[float], tmp_path: Path
) -> None:
    overrides = ("parallel.cp=2", ONE_BATCH)
    ranks = run_world(2, train, demo, tmp_path, overrides, folder=tmp_path / "cp2")
    assert [found for found, _ in ranks] == [pytest.approx(losses, rel=1e-5)] * 2
    assert sum(frames for _, frames in ranks) == 8 * 5, "the third batch came back from disk"
    (done,) = run_world(1, fill, demo, tmp_path, folder=tmp_path / "fill")
    assert done.encoded + done.found == 8
    assert done.found >= 3, "the videos that made room for others are whole on disk"
    ((found, frames),) = run_world(1, train, demo, tmp_path, (), folder=tmp_path / "alone")
    assert found == pytest.approx(losses, rel=1e-5)
    assert frames == 0


def train_and_save(demo: DemoWorld, folder: Path) -> None:
    """SFT that trains the tower too."""
    train_sft(demo.config(folder / "run", "sft.steps=1", task="sft"))


def test_weights_of_another_run_have_entries_of_their_own(demo: DemoWorld, filled: Path, tmp_path: Path) -> None:
    """model.init_from: the fill reads the tower from the checkpoint, without the LLM."""
    run_world(2, train_and_save, demo, tmp_path / "first", folder=tmp_path / "first" / "processes")
    init = (f"model.init_from={tmp_path / 'first' / 'run' / 'checkpoints'}",)
    shutil.copytree(filled / "cache", tmp_path / "cache")
    (done, _) = run_world(2, fill, demo, tmp_path, init, folder=tmp_path / "fill")
    assert (done.encoded, done.found) == (8, 0)
    tp2 = (*init, "parallel.tp=2")
    for _, frames in run_world(2, train, demo, tmp_path, tp2, folder=tmp_path / "tp2"):
        assert frames == 0


def test_damaged_entries_and_unreadable_videos_are_counted_by_the_fill(
    demo: DemoWorld, filled: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled / "cache", cache)
    bad = sorted(cache.rglob("*.safetensors"))[2]
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    rows = [json.loads(line) for line in demo.sft.read_text().splitlines()]
    manifest = tmp_path / "train.jsonl"
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    rows += [{**rows[0], "id": name, "problem_id": name, "videos": [str(broken)]} for name in ("x", "y")]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (f"data.train={manifest}", f"data.video_dir={demo.sft.parent}")
    (done, _) = run_world(2, fill, demo, tmp_path, overrides, folder=tmp_path / "processes")
    assert (done.encoded, done.found, done.unreadable, done.refused) == (1, 7, 1, 1)
    dropped = [json.loads(line) for line in (cache / "dropped.jsonl").read_text().splitlines()]
    assert [(row["sample_id"], row["stage"]) for row in dropped] == [("x", "decode"), ("y", "decode")]
    assert all(row["reason"].startswith(f"{broken}: ") for row in dropped)
    log = (tmp_path / "processes" / "rank0.log").read_text() + (tmp_path / "processes" / "rank1.log").read_text()
    assert f"{bad} is refused" in log
    assert "9 videos, 1 encoded, 7 there already, 1 unreadable (2 samples, see dropped.jsonl)" in log


def test_a_full_folder_ends_the_fill_and_makes_room_for_training(
    demo: DemoWorld, filled: Path, losses: list[float], tmp_path: Path
) -> None:
    files = [path.stat().st_size for path in (filled / "cache").rglob("*.safetensors")]
    budget = sum(sorted(files)[-3:])  # for three of eight videos
    bound = f"video.cache_dir_gib={budget / 2**30}"
    world = World(2, fill, demo, tmp_path, (bound,), folder=tmp_path / "fill")
    assert 0 not in world.exit_codes()
    assert "more do not fit: raise video.cache_dir_gib (now 0.000) or take fewer videos" in world.log()
    overrides = (bound, ONE_BATCH, "parallel.cp=2")
    ranks = run_world(2, train, demo, tmp_path, overrides, folder=tmp_path / "train")
    assert [found for found, _ in ranks] == [pytest.approx(losses, rel=1e-5)] * 2
    assert 0 < sum(frames for _, frames in ranks) < 3 * 4 * 5
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["evicted_embeddings"] > 0
    held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert held <= budget + 2 * max(files), "two write at a time, and neither counts what the other has just begun"
