"""Launch scripts run for real: started, one of their processes killed from outside, all of it ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from harness import DemoWorld, make_model_for_vllm

from megalong.metrics import read_jsonl
from megalong.rollout.vllm_engine import SERVER

ROOT = Path(__file__).parents[1]
SRUN = """#!/usr/bin/env bash
set -euo pipefail
[[ $1 == --kill-on-bad-exit=1 ]] && shift
"$@" & first=$!
"$@" & second=$!
wait $first
wait $second
"""


def launch(script: str, *args: str, folder: Path, **environment: str) -> subprocess.Popen:
    """A launch script, without GPUs unless CUDA_VISIBLE_DEVICES is given; its output goes to folder/log.

    srun starts two "nodes" of one process each on this machine.
    """
    (folder / "srun").write_text(SRUN)
    (folder / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    # torchrun binds it seconds later: below what the system gives to those who ask for any port, by process.
    port = 20000 + os.getpid() % 10000
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


Victim = int | Literal["engine"]
"""A rank, or the process of its vLLM engine where one rank drives one."""


def kill(victim: Victim, *, launched: subprocess.Popen, folder: Path) -> None:
    """SIGKILL a process of what `launched` started, once the run has made two steps."""
    deadline = time.monotonic() + 240
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(read_jsonl(metrics)) >= 2):
        assert launched.poll() is None, "ended before its second step"
        assert time.monotonic() < deadline, "no two steps within four minutes"
        time.sleep(0.05)
    processes = descendants(folder)
    parents, engines = {}, []
    for pid in processes:
        with suppress(OSError):  # a helper that is gone meanwhile
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            engines += [pid] if SERVER.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") else []
    # A rank's helpers have its environment, too.
    ranks = [pid for pid in parents if processes[pid] == str(victim) and processes.get(parents[pid], "") is None]
    (found,) = engines if victim == "engine" else ranks
    os.kill(found, signal.SIGKILL)


def run_script(
    script: str, *args: str, folder: Path, victim: Victim | None = None, limit: float = 240, **environment: str
) -> tuple[int, str]:
    """Exit code and log of a launch script, run to its end within `limit` seconds. victim: what to kill on the way."""
    launched = launch(script, *args, folder=folder, **environment)
    try:
        if victim is not None:
            kill(victim, launched=launched, folder=folder)
        code = launched.wait(timeout=limit)
    finally:
        end_all(launched, folder)
    return code, (folder / "log").read_text()


def kill_engine(demo: DemoWorld, folder: Path, *overrides: str, steps: int, **environment: str) -> str:
    """GRPO whose vLLM engine is killed once: it starts again from its last checkpoint, and ends. Returns its log."""
    model, run_dir = make_model_for_vllm(demo, folder / "model"), folder / "run"
    args = [str(model), str(demo.rl), *demo.overrides(run_dir, task="grpo"), *overrides]
    args += ["rollout.engine=vllm", f"grpo.steps={steps}", "checkpoint.save_every=1"]
    settings = {"RESTARTS": "1", "RECIPE": str(demo.recipe), **environment}
    code, log = run_script("grpo_7b_8xa100.sh", *args, folder=folder, victim="engine", limit=400, **settings)
    assert code == 0, log[-8000:]
    said = r"rank 0, phase '\w+': the vLLM engine \(process \d+, GPUs .*, exit code -9\) (ended|hung up) in "
    assert re.search(said, log), log[-8000:]
    assert log.count("step 1 | loss") == 1  # it did not start over
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == list(range(1, steps + 1))
    return log


def end_all(launched: subprocess.Popen, folder: Path) -> None:
    for pid in descendants(folder):
        os.kill(pid, signal.SIGKILL)
    launched.wait()
