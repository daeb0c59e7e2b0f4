"""In the place of megalong.rollout.vllm_server: answers every call with None, and generate() as FAKE_ENGINE says."""

from __future__ import annotations

import os
import pickle
import sys
import time
from multiprocessing.connection import Connection
from pickletools import genops

SLOW_SECONDS = 1.0


def serve(connection: Connection) -> None:
    while True:
        try:
            # Its first string; to load all of it would take seconds: it holds tensors, and torch is not imported here.
            method = next(text for _, text, _ in genops(connection.recv_bytes()) if isinstance(text, str))
        except EOFError:
            return
        fault = os.environ["FAKE_ENGINE"] if method == os.environ["FAKE_METHOD"] else ""
        if fault:
            print(f"line before the {fault}", file=sys.stderr, flush=True)  # noqa: T201
        if fault == "exit":
            os._exit(7)
        if fault == "kill":
            os.kill(os.getpid(), 9)
        if fault == "hang":
            time.sleep(600)
        if fault in ("slow", "sample"):
            time.sleep(SLOW_SECONDS if fault == "slow" else 0)
            connection.send_bytes(pickle.dumps((True, ([["group"]], [[2]]))))
            continue
        reply = (False, "Traceback ..\nValueError: no such token") if fault == "error" else (True, None)
        connection.send_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as trainer:
        serve(trainer)
