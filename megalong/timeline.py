"""What a step did when: the phases of the trainer and its engine, the decoding beside them, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megalong.metrics import TIMELINE_FILE, Span, read_jsonl

PICTURE_FILE = "timeline.png"
LANE_OF = {"data": "data", "rollout": "rollouts"}
"""Lane of a phase; the others are the trainer's."""
LANES = ("decoding ahead", "data", "rollouts", "trainer")


def timeline_row(phases: Sequence[Span], decoding: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """A step's line of timeline.jsonl.

    phases: of the main process, in order. decoding: begin and end of what its decoding threads worked on; several at a
    time become one span. Returns {"seconds": of the step, "spans": [{"lane", "phase", "begin", "end"}]}, seconds since
    the step's first phase began. Decoding that ended before is left out; what began before has a negative begin.
    """
    start = min((begin for _, begin, _ in phases), default=0.0)
    busy = [("decoding", begin, end) for begin, end in _union(decoding) if end > start]
    spans = [("decoding ahead", *span) for span in busy] + [
        (LANE_OF.get(name, "trainer"), name, *at) for name, *at in phases
    ]
    return {
        "seconds": max((end for *_, end in phases), default=0.0) - start,
        "spans": [
            {"lane": lane, "phase": phase, "begin": begin - start, "end": end - start}
            for lane, phase, begin, end in spans
        ],
    }


def _union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals that do not touch, covering the same."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def typical(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The step of median length; not the first, which does things for the first time, unless there is no other."""
    rows = sorted(rows[1:] or rows, key=lambda row: row["seconds"])
    return rows[(len(rows) - 1) // 2]


def plot_timeline(run_dir: str | Path) -> Path:
    """Draw a typical step of timeline.jsonl to timeline.png: a lane below the other, phases in colours.

    The lane of rollouts is what the trainer waited for them. Raises ValueError when no step was recorded.
    """
    source, target = Path(run_dir) / TIMELINE_FILE, Path(run_dir) / PICTURE_FILE
    rows = read_jsonl(source) if source.exists() else []
    if not rows:
        raise ValueError(f"{source}: no step was recorded; nothing to draw")
    row = typical(rows)
    phases = list(dict.fromkeys(span["phase"] for span in row["spans"]))
    lanes = [lane for lane in LANES if any(span["lane"] == lane for span in row["spans"])]
    figure = Figure(figsize=(10, 0.7 * len(lanes) + 1.6), layout="constrained")
    axis = figure.subplots()
    for index, phase in enumerate(phases):
        spans = [span for span in row["spans"] if span["phase"] == phase]
        total = sum(span["end"] - span["begin"] for span in spans)
        for number, span in enumerate(spans):
            first = max(0.0, span["begin"])
            axis.barh(
                lanes.index(span["lane"]), span["end"] - first, left=first, height=0.7, color=f"C{index}",
                label=f"{phase} {total:.1f} s" if number == 0 else None,
            )  # fmt: skip
    axis.set_yticks(range(len(lanes)), lanes)
    axis.invert_yaxis()
    axis.set_xlim(0, max(row["seconds"], 1e-9))
    axis.set_xlabel("seconds since the step began")
    axis.set_title(f"Step {row['step']}: {row['seconds']:.1f} s")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(target, dpi=120)
    return target
