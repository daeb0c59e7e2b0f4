"""`megalong eval` in the folder of a training run leaves what the run wrote as it is."""

from __future__ import annotations

import json
from pathlib import Path

from faulty_runs import train
from harness import DemoWorld, run_world

from megalong.__main__ import main
from megalong.metrics import PhaseTimer
from megalong.run import open_run

ACCURACY = {"eval/strict", "eval/tolerant"}


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
    assert row.keys() == {"step", *ACCURACY}
    assert json.loads((folder / "eval.json").read_text())["overall"]["strict"] == row["eval/strict"]
    assert len((folder / "eval_responses.jsonl").read_text().splitlines()) == 8


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
