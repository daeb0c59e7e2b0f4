"""The end of a process group: an engine's process, its workers, and the shared memory that they would leave behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

_SEGMENT = re.compile(r"/dev/shm/psm_\w+$", re.MULTILINE)
"""In /proc/PID/maps: a file of multiprocessing.shared_memory that has a name; what is unlinked ends in "(deleted)"."""


def end_with(trainer: int, folder: str) -> None:
    """Wait until the process `trainer` is gone, then end this one and its workers, whatever they wait for.

    A trainer that was killed cannot hang up on a call in progress, nor delete its folder of shared memory.
    """
    while os.getppid() == trainer:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    end_group(os.getpgid(0))


def end_group(group: int) -> None:
    """Kill a process group at once. Raises ProcessLookupError when it is gone.

    vLLM's workers talk through multiprocessing.shared_memory, which Python's resource tracker would unlink, and that is
    one of the group.
    """
    for path in _segments(group):
        with suppress(OSError):
            path.unlink()
    os.killpg(group, signal.SIGKILL)


def _segments(group: int) -> set[Path]:
    """Files of multiprocessing.shared_memory that processes of the group have mapped."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if os.getpgid(int(process.name)) == group:
                found.update(_SEGMENT.findall((process / "maps").read_text(errors="replace")))
    return set(map(Path, found))
