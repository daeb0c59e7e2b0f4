"""No silent hang: a process whose phase lasts too long writes the stacks of its threads and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megalong.metrics import PhaseTimer

STUCK_EXIT_CODE = 3


class Watchdog:
    """Watches a PhaseTimer from a thread, from its making to `close`.

    When a phase has lasted `limit_seconds`, all Python stacks go to `stacks_file` and stderr, `report` gets a sentence
    about phase and time, and the process ends with STUCK_EXIT_CODE: torchrun then ends the other ranks, and starts all
    again where it may. A process that was stopped as a whole (SIGSTOP, a suspended machine) is not counted as stuck
    for longer than one look of the thread.
    """

    def __init__(
        self, timer: PhaseTimer, *, limit_seconds: float, stacks_file: Path, report: Callable[[str], None]
    ) -> None:
        self._timer, self._limit = timer, limit_seconds
        self._stacks_file, self._report = stacks_file, report
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick = min(10.0, self._limit / 10)
        while True:
            # A call that keeps Python's lock stops this thread too: faulthandler's own then writes the stacks and ends
            # the process. Under pytest sys.stderr may be no file.
            faulthandler.dump_traceback_later(self._limit + 2 * tick, exit=True, file=sys.__stderr__)
            if self._closed.wait(tick):
                return
            phase, seconds = self._timer.phase, time.monotonic() - self._timer.since
            if seconds > self._limit:
                self._end(phase, seconds)

    def _end(self, phase: str, seconds: float) -> None:
        self._stacks_file.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks_file.open("w", encoding="utf-8") as file:
            file.write(f"phase {phase!r} for {seconds:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        self._report(
            f"phase {phase!r} has lasted {seconds:.0f} s; the stacks of all threads are in {self._stacks_file}"
        )
        sys.stdout.flush()
        os._exit(STUCK_EXIT_CODE)
