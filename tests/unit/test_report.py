"""write_summary: numbers of a made-up demo folder arrive in summary.json, the table and the picture."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from megalong.__main__ import main
from megalong.evaluate.score import AccuracyRow, ChoiceAccuracy, EvalReport
from megalong.report import ReportError, read_accuracy, summary_table, write_summary


def accuracy_row(strict: float, tolerant: float, likelihood: ChoiceAccuracy | None = None) -> AccuracyRow:
    return AccuracyRow(
        num_questions=10, strict=strict, tolerant=tolerant, strict_pass=strict, tolerant_pass=tolerant,
        likelihood=likelihood,
    )  # fmt: skip


def report(overall: float, *, likelihood: bool = True) -> str:
    choices = ChoiceAccuracy(num_questions=8, accuracy=overall + 0.02, chance=0.25) if likelihood else None
    return EvalReport(
        categories={
            "temporal": accuracy_row(overall + 0.1, 0.9),
            "spatial": accuracy_row(overall - 0.1, 0.9),
        },
        overall=accuracy_row(overall, overall + 0.05, choices),
        num_samples=1,
        format_rate=1.0,
        mean_response_chars=20.0,
    ).to_json()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": i, "loss": 4 / i, "seconds/train": 0.5} for i in (1, 2)])
    rows = [{"step": i, "reward": i / 4, "reward/accuracy": i / 8, "kl": 0.1, "seconds/rollout": 1.5} for i in (1, 2)]
    write_lines(tmp_path / "grpo" / "metrics.jsonl", rows)
    (tmp_path / "sft" / "eval_start.json").write_text(report(0.25))
    (tmp_path / "sft" / "eval_end.json").write_text(report(0.5))
    (tmp_path / "grpo" / "eval_end.json").write_text(report(0.75))
    (tmp_path / "seconds.json").write_text('{"data": 10,"sft": 100,"grpo": 200}')
    return tmp_path


def test_summary_holds_accuracies_curve_and_seconds(demo: Path) -> None:
    summary = write_summary(demo)
    assert json.loads((demo / "summary.json").read_text()) == summary
    assert [summary[f"accuracy_{stage}"]["overall"] for stage in ("untrained", "sft", "grpo")] == [0.25, 0.5, 0.75]
    assert summary["accuracy_sft"]["categories"] == pytest.approx({"temporal": 0.6, "spatial": 0.4})
    assert summary["accuracy_grpo"]["tolerant"] == pytest.approx(0.8)
    assert summary["accuracy_grpo"]["likelihood"] == pytest.approx(0.77)
    assert summary["accuracy_grpo"]["chance"] == 0.25
    assert summary["reward_curve"] == [
        {"step": 1, "reward": 0.25, "reward/accuracy": 0.125},
        {"step": 2, "reward": 0.5, "reward/accuracy": 0.25},
    ]
    assert summary["seconds"] == {
        "stages": {"data": 10.0, "sft": 100.0, "grpo": 200.0},
        "total": 310.0,
        "phases": {"sft": {"seconds/train": 1.0}, "grpo": {"seconds/rollout": 3.0}},
    }


def test_pictures_are_drawn(demo: Path) -> None:
    write_summary(demo)
    picture = matplotlib.image.imread(demo / "learning_curve.png")
    assert picture.shape[:2] == (432, 1620)
    green = (abs(picture[..., :3] - [44 / 255, 160 / 255, 44 / 255]) < 0.02).all(-1)
    bars = [green[:, 1080:][:, i * 180 : (i + 1) * 180].sum() for i in range(3)]
    assert bars[0] < bars[1] < bars[2]
    assert (demo / "grpo" / "reward_curve.png").stat().st_size > 10_000


def test_table_is_in_percent(demo: Path) -> None:
    lines = [line.split() for line in summary_table(write_summary(demo)).splitlines()]
    assert lines[0][-5:] == ["Temporal", "Spatial", "Overall", "tolerant", "likelihood"]
    assert lines[1] == ["untrained", "35.0", "15.0", "25.0", "30.0", "27.0"]
    assert lines[3] == ["grpo", "85.0", "65.0", "75.0", "80.0", "77.0"]
    assert " ".join(lines[4]) == "likelihood: most likely option, multiple choice only; 25.0 by chance"
    assert " ".join(lines[5]) == "wall clock: data 10 s, sft 100 s, grpo 200 s, total 310 s"


def test_evaluations_without_likelihood_show_none(demo: Path) -> None:
    for file in ("sft/eval_start.json", "sft/eval_end.json", "grpo/eval_end.json"):
        (demo / file).write_text(report(0.5, likelihood=False))
    summary = write_summary(demo)
    assert (summary["accuracy_grpo"]["likelihood"], summary["accuracy_grpo"]["chance"]) == (None, None)
    lines = [line.split() for line in summary_table(summary).splitlines()]
    assert lines[3] == ["grpo", "60.0", "40.0", "50.0", "55.0", "-"]
    assert lines[4][:2] == ["wall", "clock:"]


def test_a_report_without_its_fields_is_named(tmp_path: Path) -> None:
    path = tmp_path / "eval_end.json"
    path.write_text('{"overall": {"strict": 0.5, "likelihood": null}, "categories": {}}')
    with pytest.raises(ReportError, match=r"eval_end.json: not an evaluation report: KeyError\('tolerant'\)"):
        read_accuracy(path)
    path.write_text("[]")
    with pytest.raises(ReportError, match="expected a JSON object, got list"):
        read_accuracy(path)


@pytest.mark.parametrize(
    ("removed", "lacks"),
    [("sft/eval_end.json", "sft/eval_end.json"), ("grpo", "grpo/metrics.jsonl, grpo/eval_end.json")],
)
def test_what_a_phase_that_has_not_run_would_have_written_is_named(demo: Path, removed: str, lacks: str) -> None:
    (shutil.rmtree if removed == "grpo" else os.remove)(demo / removed)
    with pytest.raises(FileNotFoundError) as caught:
        write_summary(demo)
    assert str(caught.value) == (
        f"{demo} lacks {lacks}; a report is of a folder that launch/demo.sh filled, with sft/metrics.jsonl, "
        "grpo/metrics.jsonl, sft/eval_start.json, sft/eval_end.json, grpo/eval_end.json, seconds.json: run all its "
        f"stages with OUT={demo}"
    )
    assert not (demo / "summary.json").exists()


def test_a_file_that_is_no_report_is_named_without_a_traceback(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("sft/eval_end.json", "grpo/metrics.jsonl"):
        (demo / file).write_text("no JSON\n")
        assert main(["report", str(demo)]) == 2
        assert f"{demo / file}" in capsys.readouterr().err
        (demo / "sft/eval_end.json").write_text(report(0.5))
