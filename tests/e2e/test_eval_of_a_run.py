"""`megalong eval` in the folder of a training run leaves what the run wrote as it is."""

from __future__ import annotations

import json
from pathlib import Path

from faulty_runs import train
from harness import DemoWorld, run_world

from megalong.__main__ import main

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
