"""Points of a benchmark measured in processes of their own: time limits, estimates, and runs out of memory."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from steps import Bench, Case, free, is_out_of_memory, make_folder, parallel_overrides, parser_of, save

from megalong.parallel.collectives import broadcast_object
from megalong.parallel.layout import destroy_layout

TEXT = 256
"""Text tokens of a prompt beside its video."""
LARGEST_GAPS = {"loss": 1e-5, "gradient norm": 1e-2, "log-probabilities": 0.1}
"""Of two modes in bfloat16 (gaps). Of 28 random layers, norms were up to 2e-3 and log-probabilities 0.04 apart (of 4,
0.01); 0.06 and more than 1 where responses did not see their prompt. The loss is float32 of the advantages alone, as a
step's probabilities are their own old ones."""
OUT_OF_MEMORY = 17
"""Exit code of a rank that ran out of memory: the others may wait for it in a collective, so all of them end."""


def timing_options(doc: str) -> argparse.ArgumentParser:
    """parser_of, and how often a step is timed."""
    parser = parser_of(doc)
    parser.add_argument(
        "--timed", type=int, choices=(1, 2, 3), default=3, help="most timed steps of a point; long steps have fewer"
    )
    return parser


def passes(expected: float, *, timed: int) -> int:
    """Steps of a point of `expected` seconds, the first of which warms up; 1: a short step does.

    timed: the most that are timed.
    """
    usual = 4 if expected < 4 else 3 if expected < 10 else 2 if expected < 25 else 1
    return min(usual, 1 + timed if expected < 10 else timed)


def measure(bench: Bench, point: dict[str, Any], *, expected: float) -> dict[str, Any]:
    """The median step of a point (the faster of two); expected: seconds a step may take.

    A long step is warmed up by a shorter one of the same mode, which is long enough for the kernels of long sequences
    (attention.kernels.LONG_FROM_TOKENS), and by page-locking what it will offload.
    """
    case, how = Case(**point["case"]), {"mode": point["mode"], "recompute": point["recompute"]}
    count = passes(expected, timed=point["timed"])
    short = replace(case, frames=min(case.frames, 128), text=min(case.text, 32_768))
    bench.step(bench.packs(case if count > 1 else short, mode=point["mode"]), **how)
    if count == 1:
        bench.page_lock(case, **how)
    packs = bench.packs(case, mode=point["mode"])
    return median_step([bench.step(packs, **how) for _ in range(max(1, count - 1))])


def median_step(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The faster of two in the middle."""
    chosen = sorted(steps, key=lambda step: step["seconds"])[(len(steps) - 1) // 2]
    return {**chosen, "all_seconds": [step["seconds"] for step in steps]}


def expect(row: dict[str, Any], rows: Iterable[dict[str, Any]], *, rate: float) -> float:
    """Seconds of a step: at the FLOP/s of each GPU in the last step of its series, or at `rate`."""
    known = [r["flops"] / r["seconds"] / r["world"] for r in rows if r["series"] == row["series"] and "seconds" in r]
    return row["flops"] / row["world"] / (known[-1] if known else rate)


def beyond_memory(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """Why a point cannot fit: a smaller one of its series did not."""
    for other in rows:
        alike = (other["series"], other["world"]) == (row["series"], row["world"])
        if alike and other["size"] <= row["size"] and other["status"] == "out of memory":
            return f"not run: {other['name']} did not fit into memory"
    return ""


def why_not(row: dict[str, Any], rows: Iterable[dict[str, Any]], *, expected: float, deadline: float) -> str:
    """Why a point is left out; "" when it is to be measured."""
    if reason := beyond_memory(row, rows):
        return reason
    if expected > row["max_seconds"]:
        return f"not run: estimated {expected:.0f} s a step"
    left, count = deadline - time.time(), passes(expected, timed=row["timed"])
    if count * expected > left:
        return f"not run: {count} steps of an estimated {expected:.1f} s, {max(0.0, left):.0f} s left"
    return ""


def check(bench: Bench, points: Sequence[dict[str, Any]]) -> None:
    """Take a short step in each mode of the points, as each keeps its activations: all must be the same step.

    Points of one mode are checked by another: of the shared prompt, or of plain sequences. Raises SystemExit on every
    rank where a step is another one: nothing is timed then.
    """
    case = Case(**points[0]["case"])
    # Two responses at least: one alone is the same plan in both.
    case = replace(case, frames=min(case.frames, 4), text=min(case.text, 1024), group=max(case.group, 2))
    forms = list(dict.fromkeys((point["mode"], point["recompute"]) for point in points))
    modes = {mode for mode, _ in forms}
    if len(modes) == 1:
        forms.append(("stage1+2" if modes == {"shared_prefix"} else "shared_prefix", "full"))
    steps = [bench.step(bench.packs(case, mode=mode), mode=mode, recompute=recompute) for mode, recompute in forms]
    largest = dict.fromkeys(LARGEST_GAPS, 0.0)
    for form, step in zip(forms[1:], steps[1:], strict=True):
        found = gaps(step, steps[0])
        if not all(found[name] < LARGEST_GAPS[name] for name in found):
            raise SystemExit(f"{' and '.join(map(' '.join, (form, forms[0])))} differ: {found}; nothing is timed")
        largest = {name: max(largest[name], found[name]) for name in found}
    if bench.layout.is_main:
        names = ", ".join(map(" ".join, forms))
        print(f"checked: {names}: " + ", ".join(f"{name} {far:.1e} off" for name, far in largest.items()), flush=True)
    free(bench.layout.device)


def gaps(step: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Differences of two steps: absolute, of the norm relative, of the kept log-probabilities the mean."""
    far = [abs(a - b) for a, b in zip(step["logprobs"], other["logprobs"], strict=True)]
    return {
        "loss": abs(step["loss"] - other["loss"]),
        "gradient norm": abs(step["grad_norm"] / other["grad_norm"] - 1),
        "log-probabilities": sum(far) / len(far),
    }


def work(session: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> None:
    """Check the modes of a session and measure its points on this rank; rank 0 prints each row and appends it to the
    results.

    A rank that runs out of memory among several records it and ends with OUT_OF_MEMORY; drive() goes on without that
    point.
    """
    results = Path(session["results"])
    bench = Bench(Path(session["folder"]), session["overrides"], vision=session["vision"])
    try:
        rows = [_complete(point, bench) for point in session["points"]]
        if not rows[0].get("rehearsal"):  # its attention computes nothing
            check(bench, rows)
        for row in rows:
            expected, reason = broadcast_object(
                _decision(row, read_rows(results), session), source=0, group=bench.layout.world
            )
            try:
                row |= {"status": reason} if reason else {"status": "measured"}
                row |= {} if reason else measure(bench, row, expected=expected)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                row |= {"status": "out of memory"}
                if bench.layout.world_size > 1:
                    report(row, session, line)
                    os._exit(OUT_OF_MEMORY)
            if bench.layout.is_main:
                report(row, session, line)
            free(bench.layout.device)
            dist.barrier()
    finally:
        bench.close()
    destroy_layout()


def _complete(point: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """The point with what follows from the model: how activations are kept, tokens of the group, FLOPs."""
    case, mode = Case(**point["case"]), point["mode"]
    recompute = point.get("recompute") or bench.recompute_for(case, mode=mode, memory_gb=point["memory_gb"])
    return {
        **point,
        "recompute": recompute,
        "flops": bench.flops(case, mode=mode, recompute=recompute),
        "model_flops": bench.flops(case, mode=mode, recompute="none"),
        "world": bench.layout.world_size,
    }


def _decision(row: dict[str, Any], rows: list[dict[str, Any]], session: dict[str, Any]) -> tuple[float, str]:
    if row.get("rehearsal"):  # once, after a short one; it does not take what its FLOPs say
        return math.inf, beyond_memory(row, rows)
    expected = expect(row, rows, rate=session["rate"])
    return expected, why_not(row, rows, expected=expected, deadline=session["deadline"])


def report(row: dict[str, Any], session: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> None:
    """Print the row and write all so far where --json says: of a session that is cut off, these are there."""
    print(line(row), flush=True)
    results = Path(session["results"])
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    save(session["json"], read_rows(results))


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Rows so far; the first of a point counts (several ranks may run out of memory)."""
    rows = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
    return list({row["name"]: row for row in reversed(rows)}.values())[::-1]


def video_session(args: Any, points: Sequence[dict[str, Any]], *, rate: float) -> dict[str, Any]:
    """A session of one replica on videos, for drive(): `size` of a point is its number of frames, the rest of the case
    and the layout are the command line's."""
    length = args.length or (8 if args.tiny else 512)
    case = {"text": TEXT, "group": args.responses, "response": length}
    return {
        "gpus": args.gpus,
        "layers": args.layers or (2 if args.tiny else 28),
        "tiny": args.tiny,
        "vision": True,
        "overrides": [*parallel_overrides(gpus=args.gpus, tp=args.tp, cp_a2a=args.cp_a2a), *args.overrides],
        "rate": rate,
        "points": [
            {
                **point,
                "case": {"frames": point["size"], **case},
                "timed": args.timed,
                "max_seconds": args.max_seconds,
            }
            for point in points
        ],
    }


def drive(
    sessions: Sequence[dict[str, Any]],
    args: Any,
    *,
    script: str,
    line: Callable[[dict[str, Any]], str],
    work_of: Callable[[dict[str, Any], Callable[[dict[str, Any]], str]], None] = work,
) -> list[dict[str, Any]]:
    """Run the sessions one after another, each in processes of its own, for --seconds; returns the rows of all points,
    which --json has as they come.

    A session is {gpus, layers, tiny, vision, overrides, rate (FLOP/s of a GPU, before one is known), points}; a point
    {name, series, size, case, mode, recompute or memory_gb, timed, max_seconds, and maybe rehearsal}. After out of
    memory the session is started again for the points that are left. A lone session of one process runs in this one, by
    work_of, which `script` calls, too.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    deadline = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "rows.jsonl"
        for number, given in enumerate(sessions):
            folder = make_folder(Path(scratch) / str(number), layers=given["layers"], tiny=given["tiny"])
            session = {**given, "folder": str(folder), "results": str(results), "json": args.json, "deadline": deadline}
            if len(sessions) == 1 and given["gpus"] == 1:
                work_of(session, line)
            else:
                _run_in_processes(session, results, script=script, line=line)
        return read_rows(results)


def _run_in_processes(
    session: dict[str, Any], results: Path, *, script: str, line: Callable[[dict[str, Any]], str]
) -> None:
    file = Path(session["folder"]) / "session.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={session['gpus']}"]
    while True:
        done = {row["name"] for row in read_rows(results)}
        left = [point for point in session["points"] if point["name"] not in done]
        if not left:
            return
        file.write_text(json.dumps({**session, "points": left}))
        process = subprocess.Popen([*launcher, script, "--worker", str(file)], start_new_session=True)
        try:
            code: int | str = process.wait(timeout=max(1.0, session["deadline"] + 30 - time.time()))
        except subprocess.TimeoutExpired:
            code = "time is up"
        finally:
            _end(process)
        found = read_rows(results)
        if any(row["status"] == "out of memory" and row["name"] not in done for row in found):
            for point in left:
                row = {**point, "world": session["gpus"]}
                if row["name"] not in {r["name"] for r in found} and (reason := beyond_memory(row, found)):
                    report({**row, "status": reason}, session, line)
            continue
        for point in left:
            if point["name"] not in {row["name"] for row in found}:
                report({**point, "status": f"failed: {code}", "world": session["gpus"]}, session, line)
        return


def _end(process: subprocess.Popen) -> None:
    """End the launcher, which ends the processes that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
