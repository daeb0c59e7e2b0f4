"""The watchdog lets a process work whose phases change, and ends one that is stuck, even without Python's lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHILD = """
import ctypes, sys, time
from pathlib import Path
from megalong.metrics import PhaseTimer
from megalong.watchdog import Watchdog

timer = PhaseTimer()
def watch():
    file = Path(sys.argv[1]) / "run" / "stuck.txt"
    return Watchdog(timer, limit_seconds=2.0, stacks_file=file, report=lambda what: print(what, flush=True))

def wait_in_python():
    time.sleep(45)

def wait_holding_the_lock():
    ctypes.PyDLL(None).sleep(45)

watchdog = watch()
for _ in range(8):
    with timer("train"), timer.during("inner"):
        time.sleep(0.5)
print("changing phases", flush=True)
watchdog.close()
time.sleep(3)
print("closed", flush=True)
watch()
with timer("rollout"):
    globals()[sys.argv[2]]()
print("never")
"""


def run_child(folder: Path, wait: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), wait], capture_output=True, text=True, timeout=55
    )  # fmt: skip


def test_a_stuck_phase_ends_the_process_with_its_stacks(tmp_path: Path) -> None:
    done = run_child(tmp_path, "wait_in_python")
    assert done.returncode == 3, done.stderr
    *before, line = done.stdout.splitlines()
    assert before == ["changing phases", "closed"]
    file = tmp_path / "run" / "stuck.txt"
    assert line.startswith("phase 'rollout' has lasted ")
    assert line.endswith(f" s; the stacks of all threads are in {file}")
    for text in (file.read_text(), done.stderr):
        assert "in wait_in_python\n" in text
        assert "in _watch\n" in text  # all threads


def test_a_call_that_keeps_pythons_lock_is_ended_too(tmp_path: Path) -> None:
    done = run_child(tmp_path, "wait_holding_the_lock")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == ["changing phases", "closed"]
    assert "in wait_holding_the_lock\n" in done.stderr
