"""A run that cannot go on says on each rank, in one message, where and why, and ends; nothing hangs in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faulty_runs import command_line
from harness import DemoWorld, World

from megalong.engine.checkpoint import complete_checkpoints
from megalong.metrics import read_jsonl

SFT = ("sft.steps=4",)


def fail(
    demo: DemoWorld, folder: Path, *faults: str, task: str = "sft", overrides: tuple[str, ...] = SFT
) -> tuple[list[int], list[str]]:
    """Exit code, and what megalong wrote at its end, of each of two ranks, data-parallel ones by default."""
    world = World(2, command_line, demo, folder / "run", task, overrides, *faults, folder=folder)
    codes = world.exit_codes()
    return codes, [(folder / f"rank{rank}.log").read_text() for rank in range(2)]


def message(log: str) -> str:
    """The only message of a rank, which has no traceback."""
    assert "Traceback" not in log
    (line,) = [line for line in log.splitlines() if line.startswith("megalong")]
    return line


def test_the_others_of_a_killed_rank_say_so_and_end(demo: DemoWorld, tmp_path: Path) -> None:
    codes, logs = fail(demo, tmp_path, "kill_last_rank_in_step@2")
    assert codes == [1, -9]
    assert message(logs[0]).startswith(
        "megalong sft: rank 0, phase 'train': another rank ended or does not answer; the first error above"
    )
    assert "by peer" in message(logs[0])


def test_a_rank_that_hangs_ends_with_its_stacks(demo: DemoWorld, tmp_path: Path) -> None:
    codes, logs = fail(demo, tmp_path, "hang_last_rank_in_step@2", overrides=(*SFT, "parallel.timeout_minutes=0.2"))
    assert codes[1] == 3
    assert codes[0] in (1, 3)  # its own time is up at the same moment
    line = next(line for line in logs[1].splitlines() if line.startswith("megalong"))
    assert line.startswith("megalong: rank 1: phase 'train' has lasted 1")
    assert "parallel.timeout_minutes=0.2 counts as stuck" in line
    stacks = (tmp_path / "run" / "stuck_rank1.txt").read_text()
    assert stacks.startswith("phase 'train' for 1")
    assert "in hang\n" in stacks
    assert "in train_step\n" in stacks
    assert "in hang\n" in logs[1]


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (
            "gpu_out_of_memory_in_step@2",
            ("the GPU is out of memory", "Tried to allocate 2.50 GiB", "lower data.pack_tokens=1100",
             "model.recompute=full (now none)", "parallel.tp=1, cp=1, pp=1"),
        ),
        ("host_out_of_memory_in_step@2", ("out of host memory", "video.cache_gib=0.1", "data.pack_tokens=1100")),
    ],
)  # fmt: skip
def test_out_of_memory_says_what_to_change(fault: str, parts: tuple[str, ...], demo: DemoWorld, tmp_path: Path) -> None:
    codes, logs = fail(demo, tmp_path, fault)
    assert codes == [1, 1]
    assert message(logs[1]).startswith("megalong sft: rank 1, phase 'train': ")
    assert [part for part in parts if part not in message(logs[1])] == []
    assert "rank 0, phase 'train': another rank ended" in message(logs[0])


def test_a_store_without_room_for_a_step_says_which_setting_to_raise(demo: DemoWorld, tmp_path: Path) -> None:
    codes, logs = fail(demo, tmp_path, overrides=(*SFT, "video.frame_cache_gib=1e-6"))
    assert codes == [2, 2]
    for log in logs:
        assert message(log).startswith("megalong sft: 0.000 GiB of decoded frames do not fit beside the 0.000 GiB that")
        assert "raise video.frame_cache_gib (now 0.000) or lower the batch size" in message(log)


def test_an_engine_that_dies_ends_the_run_on_every_rank(demo: DemoWorld, tmp_path: Path) -> None:
    """One rank drives it, the other waits for its responses. The engine's folder, in memory, goes with it."""
    before = set(Path("/dev/shm").glob("megalong-engine-*"))
    overrides = ("parallel.tp=2", "rollout.engine=vllm", "rollout.memory_share=0.1")
    codes, logs = fail(demo, tmp_path, "engine_dies", task="grpo", overrides=overrides)
    assert codes == [1, 1]
    assert message(logs[0]).startswith("megalong grpo: rank 0, phase 'rollout': the vLLM engine (process ")
    assert "GPUs none, exit code 7) ended in generate(). The end of " in message(logs[0])
    assert "line before the exit" in logs[0]
    assert message(logs[1]).startswith("megalong grpo: rank 1, phase 'rollout': another rank ended or does not answer")
    assert set(Path("/dev/shm").glob("megalong-engine-*")) <= before


def test_a_run_whose_engine_died_goes_on_from_its_last_checkpoint(demo: DemoWorld, tmp_path: Path) -> None:
    overrides = ("parallel.tp=2", "checkpoint.save_every=1")
    assert fail(demo, tmp_path, task="grpo", overrides=(*overrides, "grpo.steps=1"))[0] == [0, 0]
    more = (*overrides, "grpo.steps=2")
    vllm = ("rollout.engine=vllm", "rollout.memory_share=0.1")
    assert fail(demo, tmp_path, "engine_dies", task="grpo", overrides=(*more, *vllm))[0] == [1, 1]
    assert fail(demo, tmp_path, task="grpo", overrides=more)[0] == [0, 0]
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_a_decoding_process_that_dies_ends_the_run_on_every_rank(demo: DemoWorld, tmp_path: Path) -> None:
    codes, logs = fail(demo, tmp_path, "decoding_process_dies")
    assert codes == [1, 1]
    assert message(logs[1]).startswith("megalong sft: rank 1, phase 'data': ")
    assert re.search(r"\.mp4: the decoding process \d+ has ended \(exit code -9; ", message(logs[1]))
    assert "video.decoder=pyav decodes without that process" in message(logs[1])
    assert ": another rank ended or does not answer; " in message(logs[0])  # in the phase that it had come to


def test_a_full_disk_leaves_the_older_checkpoint(demo: DemoWorld, tmp_path: Path) -> None:
    codes, logs = fail(demo, tmp_path, "disk_full_in_step@3", overrides=(*SFT, "checkpoint.save_every=2"))
    assert codes == [2, 2]
    partial = tmp_path / "run" / "checkpoints" / "step_00000004.partial"
    for log in logs:
        assert message(log).startswith(f"megalong sft: {partial}: cannot be written (")
        assert "GiB are free on that disk. Older checkpoints are as they were" in message(log)
    assert "rank 1: RuntimeError: Worker failure" in message(logs[0])
    assert [path.name for path in complete_checkpoints(partial.parent)] == ["step_00000002"]


def test_a_folder_that_cannot_be_deleted_ends_a_run_only_where_it_is_to_be_written(
    demo: DemoWorld, tmp_path: Path
) -> None:
    saving = (*SFT, "checkpoint.save_every=1", "checkpoint.keep=1")
    codes, logs = fail(demo, tmp_path, "busy_folders", overrides=saving)
    assert codes == [0, 0]
    folder = tmp_path / "run" / "checkpoints"
    left = [f"step_{step:08d}.partial" for step in (1, 2, 3)]
    assert sorted(path.name for path in folder.iterdir()) == [*left, "step_00000004"]
    for name in left:
        assert f"{folder / name.removesuffix('.partial')}: cannot be deleted ([Errno 39] Directory not empty" in logs[0]
    (folder / "step_00000006.partial").mkdir()
    codes, logs = fail(demo, tmp_path, "busy_folders", overrides=(*saving, "sft.steps=6"))
    assert codes == [2, 2]
    for log in logs:
        said = message(log)
        assert said.startswith(f"megalong sft: {folder}/step_00000006.partial: cannot be made anew for this save (")
        assert "OSError: [Errno 39] Directory not empty" in said
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000005"]
    assert fail(demo, tmp_path, overrides=(*saving, "sft.steps=6"))[0] == [0, 0]
    assert [path.name for path in folder.iterdir()] == ["step_00000006"]
