"""What a step did when: values of the recorded spans, and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest

from megalong import metrics
from megalong.metrics import PhaseTimer
from megalong.timeline import plot_timeline, timeline_row, typical


def lanes_of(row: dict) -> dict[str, list[tuple[str, float, float]]]:
    found: dict[str, list[tuple[str, float, float]]] = {}
    for span in row["spans"]:
        found.setdefault(span["lane"], []).append((span["phase"], span["begin"], span["end"]))
    return found


def test_phases_lie_where_they_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 101.0, 104.0, 104.5, 106.0, 106.0, 110.0, 110.0, 110.25])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer()
    for phase in ("data", "rollout", "sync", "rollout", "train"):
        with timer(phase):
            pass
    # Two threads at once, one more in the step before, one that began there.
    row = timeline_row(timer.take_spans(), [(102.0, 103.0), (97.0, 99.0), (102.5, 105.0), (99.5, 100.5)])
    assert row["seconds"] == 10.25
    assert lanes_of(row) == {
        "decoding ahead": [("decoding", -0.5, 0.5), ("decoding", 2.0, 5.0)],
        "data": [("data", 0.0, 1.0)],
        "rollouts": [("rollout", 1.0, 4.0), ("rollout", 6.0, 10.0)],
        "trainer": [("sync", 4.5, 6.0), ("train", 10.0, 10.25)],
    }
    seconds = timer.take()
    by_phase = {name: sum(end - begin for p, begin, end in sum(lanes_of(row).values(), []) if p == name)
                for name in ("data", "rollout", "sync", "train")}  # fmt: skip
    assert {f"seconds/{name}": value for name, value in by_phase.items()} == seconds
    assert sum(seconds.values()) + 0.5 == row["seconds"]  # between rollout and sync nothing was timed
    assert timer.take_spans() == []


def test_a_typical_step_is_the_median_without_the_first() -> None:
    rows = [{"step": step, "seconds": seconds} for step, seconds in enumerate([90.0, 3.0, 1.0, 2.0], start=1)]
    assert typical(rows)["step"] == 4
    assert typical(rows[:1])["step"] == 1


def test_the_picture_has_a_colour_for_each_phase(tmp_path: Path) -> None:
    row = timeline_row([("data", 0.0, 1.0), ("rollout", 1.0, 6.0), ("train", 6.0, 10.0)], [(2.0, 4.0)])
    (tmp_path / "timeline.jsonl").write_text(json.dumps({"step": 1, **row}) + "\n")
    picture = matplotlib.image.imread(plot_timeline(tmp_path))
    assert picture.shape[0] > 300
    assert picture.shape[1] == 1200
    colours = {tuple(round(255 * value) for value in pixel[:3]) for pixel in picture.reshape(-1, picture.shape[2])}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0x2C, 0xA0, 0x2C), (0xD6, 0x27, 0x28)} <= colours


def test_nothing_recorded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timeline.jsonl: no step was recorded"):
        plot_timeline(tmp_path)
