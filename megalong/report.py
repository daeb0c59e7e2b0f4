"""Summary of the demo: accuracy after each stage, learning curves, seconds; from what the runs wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megalong.metrics import METRICS_FILE, REWARD_CURVES, curve, draw_curve, plot_rewards, read_jsonl, total_seconds

EVALUATIONS = {
    "accuracy_untrained": "sft/eval_start.json",
    "accuracy_sft": "sft/eval_end.json",
    "accuracy_grpo": "grpo/eval_end.json",
}
"""Key of summary.json -> the evaluation it comes from, relative to the demo's folder."""

SUMMARY_FILE, SECONDS_FILE, PICTURE_FILE = "summary.json", "seconds.json", "learning_curve.png"


class ReportError(ValueError):
    """A file of the demo's folder that is not what a run writes; the message names it."""


def write_summary(demo_dir: str | Path) -> dict[str, Any]:
    """Write summary.json, learning_curve.png and grpo/reward_curve.png; returns what summary.json holds.

    accuracy_untrained, accuracy_sft, accuracy_grpo: fractions of 1 on the held-out questions, `overall` and
    `categories` by the strict reading, `tolerant` overall by the tolerant one, `likelihood` of the multiple-choice
    questions by the most likely option and `chance` of guessing them (both null without eval.likelihood).
    reward_curve: a row per GRPO step.
    seconds: wall clock of each stage and `total` (seconds.json), and of each phase inside the two runs.
    Raises FileNotFoundError or ReportError naming the files that are absent or the one that lacks a field.
    """
    folder = Path(demo_dir)
    needed = [*(f"{stage}/{METRICS_FILE}" for stage in ("sft", "grpo")), *EVALUATIONS.values(), SECONDS_FILE]
    absent = [file for file in needed if not (folder / file).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(absent)}; a report is of a folder that launch/demo.sh filled, with "
            f"{', '.join(needed)}: run all its stages with OUT={folder}"
        )
    try:
        sft, grpo = (read_jsonl(folder / stage / METRICS_FILE) for stage in ("sft", "grpo"))
    except ValueError as error:
        raise ReportError(str(error)) from error
    stages = {stage: float(seconds) for stage, seconds in _read(folder / SECONDS_FILE).items()}
    summary: dict[str, Any] = {key: read_accuracy(folder / file) for key, file in EVALUATIONS.items()}
    summary["reward_curve"] = [
        {"step": row["step"], **{name: row[name] for name in REWARD_CURVES if name in row}} for row in grpo
    ]
    summary["seconds"] = {
        "stages": stages,
        "total": sum(stages.values()),
        "phases": {"sft": total_seconds(sft), "grpo": total_seconds(grpo)},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (folder / SUMMARY_FILE).write_text(text, encoding="utf-8")
    plot_rewards(folder / "grpo")
    _draw(folder / PICTURE_FILE, sft=sft, grpo=grpo, summary=summary)
    return summary


def read_accuracy(path: Path) -> dict[str, Any]:
    """The numbers the summary keeps of one evaluation report (EvalReport.to_json). Fractions of 1."""
    report = _read(path)
    try:
        likelihood = report["overall"]["likelihood"] or {"accuracy": None, "chance": None}
        return {
            "overall": report["overall"]["strict"],
            "tolerant": report["overall"]["tolerant"],
            "likelihood": likelihood["accuracy"],
            "chance": likelihood["chance"],
            "categories": {name: row["strict"] for name, row in report["categories"].items()},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(
            f"{path}: not an evaluation report: {error!r} while reading overall and categories"
        ) from error


def summary_table(summary: dict[str, Any]) -> str:
    """Accuracy in percent, a line per stage and a column per category, then what is chance, and the seconds."""
    columns = list(summary["accuracy_grpo"]["categories"])
    lines = [("held-out accuracy (%)", *(name.capitalize() for name in columns), "Overall", "tolerant", "likelihood")]
    for key in EVALUATIONS:
        row = summary[key]
        values = [*(row["categories"][name] for name in columns), row["overall"], row["tolerant"], row["likelihood"]]
        shown = ("-" if value is None else f"{100 * value:.1f}" for value in values)
        lines.append((key.removeprefix("accuracy_"), *shown))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    chance = summary["accuracy_grpo"]["chance"]
    if chance is not None:
        table.append(f"likelihood: most likely option, multiple choice only; {100 * chance:.1f} by chance")
    seconds = summary["seconds"]
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds["stages"].items())
    return "\n".join([*table, f"wall clock: {stages}, total {seconds['total']:.0f} s"])


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ReportError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _draw(path: Path, *, sft: list[dict[str, Any]], grpo: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Three panels: SFT loss, GRPO reward, held-out accuracy after each stage."""
    figure = Figure(figsize=(13.5, 3.6), layout="constrained")
    loss_axis, reward_axis, accuracy_axis = figure.subplots(1, 3)
    draw_curve(loss_axis, *curve(sft, "loss"), title="SFT loss")
    draw_curve(reward_axis, *curve(grpo, "reward"), title="GRPO reward")
    labels = [key.removeprefix("accuracy_") for key in EVALUATIONS]
    bars = accuracy_axis.bar(labels, [100 * summary[key]["overall"] for key in EVALUATIONS], color="tab:green")
    accuracy_axis.bar_label(bars, fmt="%.1f")
    accuracy_axis.set_ylim(0, 105)
    accuracy_axis.set_title("Held-out accuracy (%)")
    figure.savefig(path, dpi=120)
