"""The launch scripts themselves, with torchrun: a process is killed from outside, and the run ends as if it had not.

Two "nodes" are two torchrun agents of this machine that meet at a port, started by the Slurm script as srun would.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from faulty_runs import train
from harness import DemoWorld, make_model_for_vllm, run_world
from launched import kill_engine, run_script
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megalong.metrics import read_jsonl

STEPS = 6
OVERRIDES = (f"grpo.steps={STEPS}", "checkpoint.save_every=1")


@pytest.fixture(scope="module")
def uninterrupted(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_world(2, train, demo, run_dir, "grpo", OVERRIDES, folder=run_dir / "processes")
    return run_dir


def history(run_dir: Path) -> list[dict]:
    timed = ("seconds/", "tokens_per_second")
    rows = read_jsonl(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, the optimizer's included."""
    target = run_dir / "weights.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / f"step_{STEPS:08d}", target)
    return {name: value for name, value in torch.load(target, weights_only=False).items() if torch.is_tensor(value)}


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_killed_rank_starts_again_and_the_run_ends_the_same(
    nodes: int, demo: DemoWorld, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    args = [str(demo.folder / "model"), str(demo.rl), *demo.overrides(run_dir, task="grpo"), *OVERRIDES]
    # Not from another run's checkpoints; where only the other node's process was killed, too, these are its own.
    args.append("checkpoint.resume=false")
    if nodes == 1:
        script, environment = "grpo_7b_8xa100.sh", {"RECIPE": str(demo.recipe), "GPUS": "2"}
    else:
        script, args, environment = "slurm_multi_node.sbatch", ["grpo", str(demo.recipe), *args], {}
    code, log = run_script(script, *args, folder=tmp_path, victim=1, RESTARTS="1", **environment)
    assert code == 0, log[-8000:]
    assert "exitcode: -9" in log  # it was really killed
    assert log.count("step 1 | loss") == 1  # and did not start over
    assert "Traceback" not in log
    assert "but " + str(run_dir / "checkpoints") not in log  # nor took its own checkpoints for another run's
    assert history(run_dir) == history(uninterrupted)
    ours, expected = weights(run_dir), weights(uninterrupted)
    assert len(ours) > 20
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def test_a_run_that_always_fails_ends_after_its_restarts(demo: DemoWorld, tmp_path: Path) -> None:
    wrong = (*demo.overrides(tmp_path / "run", task="grpo"), "grpo.clip_low=-1")
    args = [str(demo.folder / "model"), str(demo.rl), *wrong]
    environment = {"RECIPE": str(demo.recipe), "GPUS": "1", "RESTARTS": "1"}
    code, log = run_script("grpo_7b_8xa100.sh", *args, folder=tmp_path, **environment)
    assert code == 1, log
    assert log.count("megalong grpo: grpo.clip_low=-1 must be") == 2  # the first start and one more
    assert "ConfigError: grpo.clip_low=-1 must be" in log[log.index("Root Cause") :]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_each_node_samples_with_an_engine_of_its_own(demo: DemoWorld, tmp_path: Path) -> None:
    """Both are local rank 0 of their node; all that they share is the run folder."""
    model, run_dir = make_model_for_vllm(demo, tmp_path / "model"), tmp_path / "run"
    vllm = ("rollout.engine=vllm", "rollout.memory_share=0.1", "grpo.steps=2")
    args = ["grpo", str(demo.recipe), str(model), str(demo.rl), *demo.overrides(run_dir, task="grpo"), *vllm]
    code, log = run_script("slurm_multi_node.sbatch", *args, folder=tmp_path, limit=540)
    assert code == 0, log[-8000:]
    assert all((run_dir / f"engine_rank{rank}.log").stat().st_size for rank in range(2))
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sampler_gap_max"] < 1e-3 for row in rows), "both had the weights of the step"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_killed_engine_ends_the_attempt_and_the_next_one_starts_another(demo: DemoWorld, tmp_path: Path) -> None:
    kill_engine(demo, tmp_path, "rollout.memory_share=0.1", steps=12, GPUS="1")
