"""The launch scripts themselves, with torchrun: a process is killed from outside, and the run ends as if it had not.

Two "nodes" are two torchrun agents of this machine that meet at a port, started by the Slurm script as srun would.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faulty_runs import train
from harness import DemoWorld, run_world
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megalong.metrics import read_jsonl

ROOT = Path(__file__).parents[2]
STEPS = 6
OVERRIDES = (f"grpo.steps={STEPS}", "checkpoint.save_every=1")
SRUN = """#!/usr/bin/env bash
set -euo pipefail
[[ $1 == --kill-on-bad-exit=1 ]] && shift
"$@" & first=$!
"$@" & second=$!
wait $first
wait $second
"""


@pytest.fixture(scope="module")
def uninterrupted(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_world(2, train, demo, run_dir, "grpo", OVERRIDES, folder=run_dir / "processes")
    return run_dir


def launch(script: str, *args: str, folder: Path, **environment: str) -> subprocess.Popen:
    """A launch script, its output in folder/log."""
    (folder / "srun").write_text(SRUN)
    (folder / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": "7",
        "GPUS_PER_NODE": "1", "PORT": str(port),
    }  # fmt: skip
    settings = {
        "PYTHON": sys.executable,
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / script), *args],
            env={**os.environ, **settings, **paths, **slurm, **environment},
            stdout=log,
            stderr=log,
        )


def descendants(folder: Path) -> dict[int, str | None]:
    """Process id -> RANK (None: no rank) of all that `launch` started for this folder; torchrun makes new sessions."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"TMPDIR={folder}".encode() in variables:
            ranks = [text[5:].decode() for text in variables if text.startswith(b"RANK=")]
            found[int(process.name)] = ranks[0] if ranks else None
    return found


def kill_rank(rank: int, *, launched: subprocess.Popen, folder: Path) -> None:
    """SIGKILL a rank of what `launched` started, once the run has made two steps."""
    deadline = time.monotonic() + 120
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(read_jsonl(metrics)) >= 2):
        assert launched.poll() is None, "ended before its second step"
        assert time.monotonic() < deadline, "no two steps within two minutes"
        time.sleep(0.05)
    processes = descendants(folder)
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in processes}
    # A rank's helpers have its environment, too.
    (victim,) = [pid for pid in processes if processes[pid] == str(rank) and processes[parents[pid]] is None]
    os.kill(victim, signal.SIGKILL)


def end_all(launched: subprocess.Popen, folder: Path) -> None:
    for pid in descendants(folder):
        os.kill(pid, signal.SIGKILL)
    launched.wait()


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
    if nodes == 1:
        script, environment = "grpo_7b_8xa100.sh", {"RECIPE": str(demo.recipe), "GPUS": "2"}
    else:
        script, args, environment = "slurm_multi_node.sbatch", ["grpo", str(demo.recipe), *args], {}
    launched = launch(script, *args, folder=tmp_path, RESTARTS="1", **environment)
    try:
        kill_rank(1, launched=launched, folder=tmp_path)
        code = launched.wait(timeout=200)
    finally:
        end_all(launched, tmp_path)
    log = (tmp_path / "log").read_text()
    assert code == 0, log[-8000:]
    assert "exitcode: -9" in log  # it was really killed
    assert log.count("step 1 | loss") == 1  # and did not start over
    assert "Traceback" not in log
    assert history(run_dir) == history(uninterrupted)
    ours, expected = weights(run_dir), weights(uninterrupted)
    assert len(ours) > 20
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def test_a_run_that_always_fails_ends_after_its_restarts(demo: DemoWorld, tmp_path: Path) -> None:
    wrong = (*demo.overrides(tmp_path / "run", task="grpo"), "grpo.clip_low=-1")
    args = [str(demo.folder / "model"), str(demo.rl), *wrong]
    launched = launch("grpo_7b_8xa100.sh", *args, folder=tmp_path, RECIPE=str(demo.recipe), GPUS="1", RESTARTS="1")
    try:
        code = launched.wait(timeout=120)
    finally:
        end_all(launched, tmp_path)
    log = (tmp_path / "log").read_text()
    assert code == 1, log
    assert log.count("megalong grpo: grpo.clip_low=-1 must be") == 2  # the first start and one more
    assert "ConfigError: grpo.clip_low=-1 must be" in log[log.index("Root Cause") :]
