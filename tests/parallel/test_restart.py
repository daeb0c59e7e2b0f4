"""A run that was ended, in whatever way, continues as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_runs import CRASHED, train
from harness import DemoWorld, World, run_world

from megalong.engine.checkpoint import complete_checkpoints
from megalong.metrics import read_jsonl

SFT = ("sft.steps=6",)
GRPO = ("grpo.steps=4",)


def finish(demo: DemoWorld, run_dir: Path, task: str, overrides: tuple[str, ...], *faults: str, size: int = 1) -> None:
    """Run (or resume) in fresh processes that end well."""
    run_world(size, train, demo, run_dir, task, overrides, *faults, folder=run_dir / "processes")


def crash(demo: DemoWorld, run_dir: Path, task: str, overrides: tuple[str, ...], *faults: str) -> None:
    """Run until the fault ends the process."""
    world = World(1, train, demo, run_dir, task, overrides, *faults, folder=run_dir / "processes")
    assert world.exit_codes() == [CRASHED], world.log()


def history(run_dir: Path, *, name: str = "metrics.jsonl") -> list[dict]:
    """Rows of a run, times left out."""
    timed = ("seconds/", "tokens_per_second")
    return [
        {key: value for key, value in row.items() if not key.startswith(timed)} for row in read_jsonl(run_dir / name)
    ]


def saved_steps(run_dir: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(run_dir / "checkpoints")]


@pytest.fixture(scope="module")
def runs(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft and grpo: runs that nothing interrupted. sft_2: an SFT run ended by SIGTERM in step 2."""
    folder = tmp_path_factory.mktemp("runs")
    finish(demo, folder / "sft", "sft", SFT, "no_checkpoints")
    finish(demo, folder / "grpo", "grpo", GRPO, "no_checkpoints")
    finish(demo, folder / "sft_2", "sft", SFT, "sigterm_in_step@2")
    return folder


def test_a_run_ended_by_sigterm_saves_and_continues_bit_for_bit(demo: DemoWorld, runs: Path, tmp_path: Path) -> None:
    assert [row["step"] for row in history(runs / "sft_2")] == [1, 2]
    assert saved_steps(runs / "sft_2") == ["step_00000002"]
    resumed = shutil.copytree(runs / "sft_2", tmp_path / "run")
    finish(demo, resumed, "sft", SFT)
    assert history(resumed) == history(runs / "sft")
    assert [row["step"] for row in history(resumed)] == [1, 2, 3, 4, 5, 6]
    assert saved_steps(resumed) == ["step_00000002", "step_00000006"]


@pytest.mark.parametrize(
    ("task", "overrides", "faults", "saved"),
    [
        # A scheduler may tell a process twice, directly and through torchrun.
        ("sft", SFT, ("sigterm_in_step@2", "sigterm_in_save@2"), 2),
        ("sft", SFT, ("sigterm_in_save@6",), 6),
        ("grpo", GRPO, ("sigterm_in_save@4",), 4),
    ],
)
def test_sigterm_while_a_checkpoint_is_written_lets_it_be_written(
    task: str, overrides: tuple[str, ...], faults: tuple[str, ...], saved: int, demo: DemoWorld, tmp_path: Path
) -> None:
    """Also the last one, behind which an evaluation is left out."""
    run_dir = tmp_path / "run"
    evaluation = (f"eval.manifest={demo.rl}", "eval.at_end=true")
    finish(demo, run_dir, task, (*overrides, *evaluation), *faults, size=2)
    assert saved_steps(run_dir) == [f"step_{saved:08d}"]
    assert evaluated_steps(run_dir) == []


@pytest.mark.parametrize(("task", "overrides"), [("sft", SFT), ("grpo", GRPO)])
def test_a_run_that_crashed_in_a_step_continues_bit_for_bit(
    task: str, overrides: tuple[str, ...], demo: DemoWorld, runs: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    crash(demo, run_dir, task, (*overrides, "checkpoint.save_every=2"), "crash_in_step@4")
    assert [row["step"] for row in history(run_dir)] == [1, 2, 3]
    assert saved_steps(run_dir) == ["step_00000002"]
    finish(demo, run_dir, task, overrides, "no_checkpoints")
    assert history(run_dir) == history(runs / task)
    if task == "grpo":
        samples = history(run_dir, name="samples.jsonl")
        assert samples == history(runs / task, name="samples.jsonl")
        assert {row["step"] for row in samples} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("fault", "newest"),
    [
        ("crash_before_writing@4", "step_00000002"),
        ("crash_half_written@4", "step_00000002"),
        ("crash_before_naming@4", "step_00000002"),
        ("crash_while_deleting@2", "step_00000004"),
    ],
)
def test_a_kill_during_a_save_leaves_the_newest_complete_checkpoint(
    fault: str, newest: str, demo: DemoWorld, runs: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(runs / "sft_2", tmp_path / "run")
    crash(demo, run_dir, "sft", (*SFT, "checkpoint.save_every=4", "checkpoint.keep=1"), fault)
    assert saved_steps(run_dir) == [newest]
    assert len(list((run_dir / "checkpoints").glob("*.partial"))) == 1
    finish(demo, run_dir, "sft", SFT, "no_checkpoints")
    assert history(run_dir) == history(runs / "sft")


def test_what_a_killed_save_left_is_gone_when_the_run_starts_again(demo: DemoWorld, runs: Path, tmp_path: Path) -> None:
    """Not only at the next save: a disk that it fills has no room for the lines of a step."""
    run_dir = shutil.copytree(runs / "sft_2", tmp_path / "run")
    crash(demo, run_dir, "sft", (*SFT, "checkpoint.save_every=4"), "crash_half_written@4")
    assert len(list((run_dir / "checkpoints").glob("*.partial"))) == 1
    crash(demo, run_dir, "sft", SFT, "crash_in_step@3")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_checkpoint_that_one_rank_does_not_see_yet_is_not_saved_twice(demo: DemoWorld, tmp_path: Path) -> None:
    """At the end of the run, behind save_every: what the main process finds holds for both."""
    settings = ("sft.steps=2", "checkpoint.save_every=2")
    finish(demo, tmp_path / "run", "sft", settings, "old_view_of_the_disk@2", size=2)
    assert saved_steps(tmp_path / "run") == ["step_00000002"]


def test_a_run_continues_on_other_layouts(demo: DemoWorld, runs: Path, tmp_path: Path) -> None:
    """Two steps alone, then one on each of four layouts: TP2 with sequence parallelism, TP2 x PP2, PP2, DP2."""
    run_dir = shutil.copytree(runs / "sft_2", tmp_path / "run")
    tp2, pp2 = ("parallel.tp=2", "parallel.sequence_parallel=true"), ("parallel.pp=2",)
    for step, (size, layout) in enumerate(((2, tp2), (4, (*tp2, *pp2)), (2, pp2)), start=3):
        finish(demo, run_dir, "sft", (*SFT, *layout), f"sigterm_in_step@{step}", size=size)
    assert saved_steps(run_dir) == [f"step_{step:08d}" for step in (4, 5)]  # the two newest
    finish(demo, run_dir, "sft", SFT, "no_checkpoints", size=2)
    ours, expected = history(run_dir), history(runs / "sft")
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6]
    for row, expected_row in zip(ours, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=2e-5)
    assert ours[:2] == expected[:2]
    assert ours != expected  # the layouts really differ: only rounding is let through


def evaluating(demo: DemoWorld, *settings: str) -> tuple[str, ...]:
    """Settings of runs that evaluate after steps 0, 2, 4 and 6."""
    when = ("eval.at_start=true", "eval.every=2", "eval.at_end=true")
    return (*SFT, f"eval.manifest={demo.rl}", "eval.batch_prompts=1", *when, *settings)


def evaluated_steps(run_dir: Path) -> list[int]:
    path = run_dir / "evaluations.jsonl"
    return [row["step"] for row in read_jsonl(path)] if path.exists() else []


@pytest.mark.parametrize(("step", "size", "evaluated"), [(0, 1, []), (2, 2, [0]), (6, 1, [0, 2, 4])])
def test_sigterm_in_an_evaluation_saves_and_ends(
    step: int, size: int, evaluated: list[int], demo: DemoWorld, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    finish(demo, run_dir, "sft", evaluating(demo), f"sigterm_in_evaluation@{step}", size=size)
    assert saved_steps(run_dir) == [f"step_{step:08d}"]
    assert evaluated_steps(run_dir) == evaluated
    assert len(list(run_dir.glob("eval_*.json"))) == len(evaluated)


@pytest.fixture(scope="module")
def evaluated(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that evaluates and that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    finish(demo, run_dir, "sft", evaluating(demo))
    return run_dir


@pytest.mark.parametrize(
    "fault", ["sigterm_in_evaluation@0", "crash_in_evaluation@2", "sigterm_in_evaluation@2", "crash_in_evaluation@6"]
)
def test_an_evaluation_that_was_cut_short_is_made_when_the_run_continues(
    fault: str, demo: DemoWorld, evaluated: Path, tmp_path: Path
) -> None:
    """Once, as if nothing had happened."""
    run_dir, settings = tmp_path / "run", evaluating(demo, "checkpoint.save_every=2")
    world = World(1, train, demo, run_dir, "sft", settings, fault, folder=run_dir / "processes")
    assert world.exit_codes() == [CRASHED if "crash" in fault else 0], world.log()
    finish(demo, run_dir, "sft", settings)
    assert evaluated_steps(run_dir) == evaluated_steps(evaluated) == [0, 2, 4, 6]
    for path in evaluated.glob("eval_*.jsonl"):
        assert (run_dir / path.name).read_bytes() == path.read_bytes()
    assert history(run_dir) == history(evaluated)


def test_drops_of_an_evaluation_stay_when_the_run_continues_behind_it(demo: DemoWorld, tmp_path: Path) -> None:
    """It is not made again."""
    run_dir, manifest = tmp_path / "run", tmp_path / "lost.jsonl"
    first, *others = (json.loads(line) for line in demo.rl.read_text().splitlines())
    rows = [{**first, "videos": "nowhere.mp4"}, *others]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    when = ("sft.steps=1", "eval.at_start=true", "eval.at_end=true")
    settings = (*when, f"eval.manifest={manifest}", f"eval.video_dir={demo.rl.parent}")
    for _ in range(2):
        finish(demo, run_dir, "sft", settings)
        assert evaluated_steps(run_dir) == [0, 1]
        assert [row["step"] for row in history(run_dir, name="dropped.jsonl")] == [0, 1]


def test_a_run_that_is_complete_evaluates_nothing_again(demo: DemoWorld, evaluated: Path, tmp_path: Path) -> None:
    """Started again, on two processes: what the main one finds holds for both."""
    run_dir = shutil.copytree(evaluated, tmp_path / "run")
    finish(demo, run_dir, "sft", evaluating(demo), size=2)
    assert evaluated_steps(run_dir) == [0, 2, 4, 6]


def test_a_folder_with_checkpoints_is_refused_when_told_not_to_resume(
    demo: DemoWorld, runs: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(runs / "sft_2", tmp_path / "run")
    before = history(run_dir)
    with pytest.raises(RuntimeError) as error:
        finish(demo, run_dir, "sft", (*SFT, "checkpoint.resume=false"))
    assert f"CheckpointError: checkpoint.resume=false, but {run_dir}/checkpoints holds step_00000002" in str(
        error.value
    )
    assert history(run_dir) == before == history(runs / "sft_2")
    assert saved_steps(run_dir) == ["step_00000002"]


def test_another_task_or_model_does_not_continue_in_a_run_s_folder(demo: DemoWorld, runs: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(runs / "sft_2", tmp_path / "run")
    for task, overrides, message in (
        ("grpo", GRPO, "step_00000002 is of a run with task sft, not grpo; choose another logger.run_dir"),
        (
            "sft",
            (*SFT, f"model.path={demo.tied}"),
            f"was, not the one in model.path={demo.tied}; choose another logger.run_dir",
        ),
    ):
        with pytest.raises(RuntimeError) as error:
            finish(demo, run_dir, task, overrides)
        assert message in str(error.value)
    assert history(run_dir) == history(runs / "sft_2")


def test_a_resumed_run_keeps_its_reference_policy_though_sft_went_on(
    demo: DemoWorld, runs: Path, tmp_path: Path
) -> None:
    sft_run = shutil.copytree(runs / "sft_2", tmp_path / "sft_run")
    sft = sft_run / "checkpoints"
    overrides = ("grpo.steps=2", "grpo.kl_coef=0.1", f"model.init_from={sft}")
    finish(demo, tmp_path / "whole", "grpo", overrides)
    run_dir = tmp_path / "run"
    finish(demo, run_dir, "grpo", overrides, "sigterm_in_step@1")
    finish(demo, sft_run, "sft", SFT)
    assert saved_steps(sft_run) == ["step_00000002", "step_00000006"]
    finish(demo, run_dir, "grpo", overrides)
    assert history(run_dir) == history(tmp_path / "whole")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
    moved = shutil.move(sft, tmp_path / "moved")
    assert history(run_dir) == history(tmp_path / "whole")
    with pytest.raises(RuntimeError, match=r"the reference policy of its run is .*step_00000002, which is gone"):
        finish(demo, run_dir, "grpo", overrides)
    finish(demo, run_dir, "grpo", (*overrides, f"model.init_from={moved}"))
    assert history(run_dir) == history(tmp_path / "whole")


def test_a_damaged_checkpoint_is_named(demo: DemoWorld, runs: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(runs / "sft_2", tmp_path / "run")
    newest = run_dir / "checkpoints" / "step_00000002"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(RuntimeError, match=rf"CheckpointError: {newest}: cannot be loaded .*it is damaged, or of"):
        finish(demo, run_dir, "sft", SFT)
    (newest / "common.pt").unlink(missing_ok=True)  # which not every megatron-core writes
    with pytest.raises(RuntimeError, match=rf"CheckpointError: {newest}: cannot be loaded"):
        finish(demo, run_dir, "sft", SFT)


def test_the_command_line_saves_and_exits_0_on_sigterm(demo: DemoWorld, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*demo.overrides(run_dir, task="sft"), "sft.steps=100000"]
    command = [sys.executable, "-W", "ignore", "-m", "megalong", "sft", str(demo.recipe), *overrides]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for_a_step(process, run_dir)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
    last = history(run_dir)[-1]["step"]
    assert saved_steps(run_dir) == [f"step_{last:08d}"]
    assert 1 <= last < 100000


def wait_for_a_step(process: subprocess.Popen, run_dir: Path) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, "ended before its first step"
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.1)
