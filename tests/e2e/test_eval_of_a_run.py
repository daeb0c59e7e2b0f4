"""`megalong eval` in the folder of a training run leaves what the run wrote as it is."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from faulty_runs import command_line, train
from harness import DemoWorld, World, run_world

from megalong import evaluating
from megalong.__main__ import main
from megalong.config.tree import RunConfig
from megalong.evaluating import eval_samples, evaluate_policy
from megalong.metrics import PhaseTimer
from megalong.records import Sample
from megalong.run import Run, open_run

METRICS = {"eval/strict", "eval/tolerant", "eval/unread"}


def evaluate(demo: DemoWorld, run_dir: Path) -> None:
    argv = ["eval", str(demo.recipe), *demo.overrides(run_dir, task="grpo"), f"eval.manifest={demo.rl}"]
    assert main([*argv, "logger.tensorboard=true", f"model.init_from={run_dir}/checkpoints"]) == 0


def test_an_evaluation_has_a_folder_of_its_own(demo: DemoWorld, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ("grpo.steps=1", "logger.tensorboard=true", f"eval.manifest={demo.rl}", "eval.at_end=true")
    run_world(1, train, demo, run_dir, "grpo", settings, folder=tmp_path / "train")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert len(before) > 8
    for _ in range(2):
        run_world(1, evaluate, demo, run_dir, folder=tmp_path / "eval")
    assert {path: path.read_bytes() for path in before} == before
    folder = run_dir / "eval" / demo.rl.stem
    (row,) = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert row.keys() == {"step", *METRICS}
    assert json.loads((folder / "eval.json").read_text())["overall"]["strict"] == row["eval/strict"]
    assert len((folder / "eval_responses.jsonl").read_text().splitlines()) == 8


def test_a_report_names_its_weights_and_their_step(demo: DemoWorld, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "eval" / "rank0.log"
    run_world(1, train, demo, run_dir, "grpo", ("grpo.steps=2",), folder=tmp_path / "train")
    folder = run_dir / "eval" / demo.rl.stem
    model = demo.config(run_dir, task="grpo").model.path
    for override, weights, step in (
        (f"model.init_from={run_dir}/checkpoints", f"model.init_from={run_dir}/checkpoints/step_00000002", 2),
        (f"model.init_from={run_dir}/checkpoints/step_00000002",) * 2 + (2,),
        ("model.init_from=null", f"model.path={model}", 0),
    ):
        overrides = (override, f"eval.manifest={demo.rl}")
        world = World(1, command_line, demo, run_dir, "eval", overrides, folder=tmp_path / "eval")
        assert world.exit_codes() == [0], world.log()
        assert f"eval: {weights}, written to {folder}\nAccuracy (%)" in log.read_text()
        assert json.loads((folder / "eval.json").read_text())["weights"] == weights
        assert json.loads((folder / "evaluations.jsonl").read_text())["step"] == step


def partly_readable(demo: DemoWorld, folder: Path, *, readable: int) -> list[str]:
    """Overrides: eval.video_dir is a folder where the videos of the manifest's first questions alone can be read. Of
    the others one is torn, the rest is not there."""
    rows = [json.loads(line) for line in demo.rl.read_text().splitlines()]
    for row in rows[: readable + 1]:
        (folder / row["videos"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(demo.rl.parent / row["videos"], folder / row["videos"])
    (folder / rows[readable]["videos"]).write_text("torn")
    return [f"eval.manifest={demo.rl}", f"eval.video_dir={folder}"]


def test_questions_whose_videos_cannot_be_read_are_counted_and_said(demo: DemoWorld, tmp_path: Path) -> None:
    """On two replicas: those of both."""
    overrides = partly_readable(demo, tmp_path / "videos", readable=3)
    world = World(2, command_line, demo, tmp_path / "run", "eval", tuple(overrides), folder=tmp_path / "world")
    assert world.exit_codes() == [0, 0], world.log()
    folder = tmp_path / "run" / "eval" / demo.rl.stem
    assert json.loads((folder / "eval.json").read_text())["unread"] == 5
    assert json.loads((folder / "evaluations.jsonl").read_text())["eval/unread"] == 5
    lost = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert len(lost) == 5
    logs = [(tmp_path / "world" / f"rank{rank}.log").read_text() for rank in range(2)]
    said = f"eval: 5 of 8 questions have no response; the first: {lost[0]['sample_id']}: {lost[0]['reason']}"
    assert [log.count(said) for log in logs] == [1, 0]
    assert [log.count("responses are sampled in the training processes") for log in logs] == [1, 0]
    assert f"{folder}/dropped.jsonl; relative video paths start from eval.video_dir={tmp_path}/videos" in logs[0]


def test_an_evaluation_that_can_read_nothing_ends_without_a_report(demo: DemoWorld, tmp_path: Path) -> None:
    overrides = partly_readable(demo, tmp_path / "videos", readable=0)
    world = World(1, command_line, demo, tmp_path / "run", "eval", tuple(overrides), folder=tmp_path / "world")
    assert world.exit_codes() == [2]
    assert "megalong eval: NONE of 8 questions has a response; the first: " in world.log()
    assert f"eval.video_dir={tmp_path}/videos" in world.log()
    folder = tmp_path / "run" / "eval" / demo.rl.stem
    assert not (folder / "eval.json").exists()
    assert len((folder / "dropped.jsonl").read_text().splitlines()) == 8


def test_training_goes_on_where_no_question_can_be_read(demo: DemoWorld, tmp_path: Path) -> None:
    overrides = partly_readable(demo, tmp_path / "videos", readable=0)
    settings = ("sft.steps=2", "eval.every=1", "eval.at_end=true", *overrides)
    world = World(1, train, demo, tmp_path / "run", "sft", settings, "no_checkpoints", folder=tmp_path / "world")
    assert world.exit_codes() == [0]
    assert "eval_000001: NONE of 8 questions has a response; the first: " in world.log()
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["eval/unread"]) for row in rows] == [(1, 8), (2, 8)]


@pytest.mark.parametrize("size", [1, 2])
def test_sigterm_ends_an_evaluation_without_a_report(demo: DemoWorld, tmp_path: Path, size: int) -> None:
    overrides = (f"eval.manifest={demo.rl}", "eval.batch_prompts=1")
    fault = "sigterm_in_evaluation@0"
    world = World(size, command_line, demo, tmp_path / "run", "eval", overrides, fault, folder=tmp_path / "world")
    assert world.exit_codes() == [1] * size, world.log()
    for rank in range(size):
        log = (tmp_path / "world" / f"rank{rank}.log").read_text()
        assert "megalong eval: ended by SIGTERM before all questions were answered: there is no report" in log
        assert "Traceback" not in log
    assert not (tmp_path / "run" / "eval" / demo.rl.stem / "eval.json").exists()


class Stretches(PhaseTimer):
    """Knows the longest time between two changes of its phase: what the watchdog looks at."""

    longest = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "since" and hasattr(self, "since"):
            self.longest = max(self.longest, value - self.since)
        super().__setattr__(name, value)


def evaluated_beside_a_slow_replica(config: RunConfig, seconds: float) -> tuple[float, int]:
    """The longest stretch of an evaluation, and how many questions this replica had."""
    samples = eval_samples(config)[:7]  # four of one replica, three of the other
    answer_batch, sizes = evaluating._answer_batch, []

    def answer(this: Run, batch: Sequence[Sample], *args: object, **settings: object) -> None:
        sizes.append(len(batch))
        time.sleep(seconds if this.layout.dp_rank == 0 else 0)
        answer_batch(this, batch, *args, **settings)

    with (
        open_run(config, task="eval", timer=Stretches()) as run,
        mock.patch.object(evaluating, "_answer_batch", answer),
    ):
        run.timer.longest = 0.0
        run.vision.decoder.fallbacks = {"both.mp4": "a reason", f"{run.layout.dp_rank}.mp4": "another"}
        report = evaluate_policy(run, samples, name="eval", step=0)
        run.timer.since = time.monotonic()
    assert report.overall.num_questions == 7
    return run.timer.longest, sum(sizes)


def test_a_replica_never_waits_for_more_than_a_batch_of_another(demo: DemoWorld, tmp_path: Path) -> None:
    """Its watchdog would end an evaluation whose replicas are all well."""
    config = demo.config(tmp_path / "run", f"eval.manifest={demo.rl}", "eval.batch_prompts=1", task="grpo")
    (_, slow), (waited, fast) = run_world(2, evaluated_beside_a_slow_replica, config, 1.0, folder=tmp_path / "world")
    assert (slow, fast) == (4, 3)
    assert 1.0 < waited < 2.5  # all of the other's share takes more than four seconds
    elsewhere = [json.loads(line) for line in (tmp_path / "run" / "decoded_elsewhere.jsonl").read_text().splitlines()]
    assert {row["path"]: row["reason"] for row in elsewhere} == {
        "both.mp4": "a reason", "0.mp4": "another", "1.mp4": "another",
    }  # fmt: skip
    assert len(elsewhere) == 3


def held_for_training(demo: DemoWorld, run_dir: Path, task: str) -> list[str]:
    """What a run of the verb holds that only training needs."""
    config = demo.config(run_dir, f"eval.manifest={demo.rl}", f"model.init_from={run_dir}/checkpoints", task="grpo")
    run = open_run(config, task=task, timer=PhaseTimer())
    parameters = list(run.trainer.model.parameters())
    found = {
        "optimizer": run.trainer.optimizer is not None,
        "gradients": any(hasattr(param, "main_grad") or param.requires_grad for param in parameters),
        "gradient buffers": bool(run.trainer.ddp.buffers),
    }
    run.close()
    return [name for name, is_there in found.items() if is_there]


def test_what_does_not_train_holds_the_weights_alone(demo: DemoWorld, tmp_path: Path) -> None:
    """Gradients and optimizer states of a 7B take 16 bytes a parameter, eight times its weights."""
    run_dir = tmp_path / "run"
    run_world(1, train, demo, run_dir, "grpo", ("grpo.steps=1",), folder=tmp_path / "train")
    for task, held in (("eval", []), ("check-sync", []), ("grpo", ["optimizer", "gradients", "gradient buffers"])):
        assert run_world(1, held_for_training, demo, run_dir, task, folder=tmp_path / task) == [held]
