"""An engine's process group ends with its trainer and takes its shared memory along: tried with a program in vLLM's
place, which shares memory as vLLM's workers do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from megalong.rollout.process_group import end_group

MEMORY = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="no /dev/shm")

WORKER = """
import sys, time
from multiprocessing.shared_memory import SharedMemory
own, other = SharedMemory(create=True, size=1), SharedMemory(sys.argv[1])
print(own.name, flush=True)
time.sleep(600)
"""
ENGINE = f"""
import os, subprocess, sys, threading
from multiprocessing.shared_memory import SharedMemory
from megalong.rollout.process_group import end_with
trainer, folder = sys.argv[1:]
threading.Thread(target=end_with, args=(int(trainer), folder), daemon=True).start()
own = SharedMemory(create=True, size=1)
print(os.getpid(), own.name, flush=True)
subprocess.run([sys.executable, "-c", '''{WORKER}''', own.name])
"""
TRAINER = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]], start_new_session=True)
"""

Start = Callable[[], tuple[subprocess.Popen, int, list[Path]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Gives the trainer, the engine's process group, and the segments of the engine and its worker."""
    started: list[tuple[subprocess.Popen, int, list[Path]]] = []

    def run() -> tuple[subprocess.Popen, int, list[Path]]:
        (tmp_path / "shared").mkdir()
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER, ENGINE, str(tmp_path / "shared")], stdout=subprocess.PIPE, text=True
        )
        engine, first = trainer.stdout.readline().split()
        started.append((trainer, int(engine), [MEMORY / first, MEMORY / trainer.stdout.readline().strip()]))
        return started[-1]

    yield run
    for trainer, engine, segments in started:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
        if is_there(engine):
            os.killpg(engine, signal.SIGKILL)
        for path in segments:
            path.unlink(missing_ok=True)


def is_there(group: int) -> bool:
    """Whether a process of the group runs; one that nobody waits for stays as a zombie."""
    for process in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = process.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def wait_until(condition: Callable[[], bool], *, seconds: float = 20) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.05)
    return condition()


def test_a_killed_trainer_leaves_no_process_and_no_shared_memory(start: Start, tmp_path: Path) -> None:
    trainer, engine, segments = start()
    elsewhere = SharedMemory(create=True, size=1)
    try:
        assert is_there(engine)
        assert [path.exists() for path in segments] == [True, True]
        assert (tmp_path / "shared").is_dir()
        trainer.kill()
        trainer.wait()
        assert wait_until(lambda: not is_there(engine))
        assert [path.exists() for path in (*segments, tmp_path / "shared")] == [False] * 3
        assert (MEMORY / elsewhere.name).exists(), "what others share is theirs"
    finally:
        elsewhere.close()
        elsewhere.unlink()


def test_a_trainer_that_ends_an_engine_leaves_no_shared_memory(start: Start) -> None:
    _, engine, segments = start()
    end_group(engine)
    assert wait_until(lambda: not is_there(engine))
    assert [path.exists() for path in segments] == [False, False]
