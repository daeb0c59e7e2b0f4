"""What a run writes about itself: metrics.jsonl, TensorBoard, W&B, samples, dropped samples, files decoded elsewhere,
the step line, curves, notices.

The only home of TensorBoard and Weights & Biases. Names of metrics that the step line, the curves and the tables look
for: `reward` (weighted mean over responses), `reward/<function>`, `kl`, `entropy`, `response_tokens`,
`sampler_gap_sum` (weighted mean of |trainer - sampler| log-probability), `sampler_gap_max`, `policy_lag` (updates from
the weights that sampled to those that the step began with: with rollout.steps_off_policy=1 those of one step, which
the gap then includes), `tis_weight` (weighted mean of the truncated importance weights), `loss`, `grad_norm`,
`learning_rate`, `tokens_per_second`, `seconds/<phase>`. With vLLM also `prefilled_tokens` (that the engines computed of
the step's `sampled_groups` prompts, which have `prompt_tokens`) and `handover_seconds` (that embeddings took on their
way to the engines, added up). Steps count from 1: a step's number is how many updates were made after it; 0 is before
training.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megalong.config.errors import ConfigError
from megalong.config.load import config_yaml
from megalong.config.tree import RunConfig
from megalong.records import Dropped

METRICS_FILE, EVALUATIONS_FILE = "metrics.jsonl", "evaluations.jsonl"
SAMPLES_FILE, DROPPED_FILE, TIMELINE_FILE = "samples.jsonl", "dropped.jsonl", "timeline.jsonl"
ELSEWHERE_FILE = "decoded_elsewhere.jsonl"
SECONDS = "seconds/"

STEP_LINE: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".3f"),
    ("reward/accuracy", "acc", ".3f"),
    ("reward/format", "format", ".3f"),
    ("kl", "kl", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("response_tokens", "len", ".1f"),
    ("sampler_gap_sum", "gap", ".4f"),
    ("sampler_gap_max", "gap max", ".4f"),
    ("policy_lag", "lag", ".0f"),
    ("grad_norm", "grad", ".3f"),
    ("dropped", "dropped", ".0f"),
    ("tokens_per_second", "tok/s", ",.0f"),
)
"""Metric, label and format of each entry of the step line; those a step does not have are left out."""

Span = tuple[str, float, float]
"""What ran, its begin and its end, by time.perf_counter()."""

REWARD_CURVES = {"reward": "Overall reward", "reward/format": "Format reward", "reward/accuracy": "Accuracy reward"}


class RunLogger:
    """Writes the run folder on the main process; on the others every method does nothing.

    A logger opened at `resume_step` > 0 continues a run: lines of later steps, which the resumed run makes again, are
    dropped first. At 0 it starts over.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool,
        wandb_run: Any = None,
        config: RunConfig,
        is_main: bool,
        resume_step: int = 0,
    ) -> None:
        """wandb_run: what open_wandb gave the main process; None without W&B."""
        self.run_dir = Path(run_dir)
        self._is_main = is_main
        self._step = resume_step
        self._board: SummaryWriter | None = None
        self._wandb = wandb_run
        self._told_of_drops = False
        if not is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE, DROPPED_FILE, ELSEWHERE_FILE, TIMELINE_FILE):
            drop_later_steps(self.run_dir / name, step=resume_step)
        elsewhere = self.run_dir / ELSEWHERE_FILE
        self._elsewhere = {row["path"] for row in read_jsonl(elsewhere)} if elsewhere.exists() else set()
        if tensorboard:
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=resume_step + 1)
            self._board.add_text("config", f"```yaml\n{config_yaml(config)}```", resume_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one training step everywhere and show its line. Steps must increase."""
        if not self._is_main:
            return
        if step <= self._step:
            raise ValueError(f"step {step} cannot be logged after step {self._step}; steps must increase")
        self._step = step
        self._write(METRICS_FILE, step, metrics)
        tqdm.write(self.step_line(step, metrics))

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation made after `step` updates, under `eval/`; also to evaluations.jsonl."""
        if self._is_main:
            self._write(EVALUATIONS_FILE, step, {f"eval/{name}": value for name, value in metrics.items()})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rollouts of a step to samples.jsonl; a row is a JSON object."""
        if self._is_main:
            _append(self.run_dir / SAMPLES_FILE, [{"step": step, **row} for row in rows])

    def dropped(self, rows: Sequence[Dropped], step: int | None = None) -> None:
        """Append samples left out to dropped.jsonl. step: of an evaluation; else the step in progress, the one after
        the last logged. A run that continues keeps the lines of the steps, and of the evaluations, that it keeps."""
        if self._is_main:
            step = self._step + 1 if step is None else step
            _append(self.run_dir / DROPPED_FILE, [{"step": step, **dataclasses.asdict(row)} for row in rows])
            if rows and not self._told_of_drops:
                first = rows[0]
                tqdm.write(f"sample {first.sample_id} is left out ({first.stage}: {first.reason}); all: {DROPPED_FILE}")
                self._told_of_drops = True

    def decoded_elsewhere(self, reasons: Mapping[str, str], step: int | None = None) -> None:
        """Append files that the chosen decoder refused, and why, to decoded_elsewhere.jsonl, each once in a run.

        step: as for `dropped`.
        """
        if self._is_main:
            step = self._step + 1 if step is None else step
            new = [path for path in reasons if path not in self._elsewhere]
            rows = [{"step": step, "path": path, "reason": reasons[path]} for path in new]
            _append(self.run_dir / ELSEWHERE_FILE, rows)
            self._elsewhere.update(new)

    def timeline(self, step: int, row: Mapping[str, Any]) -> None:
        """Append what a step did when (timeline.timeline_row) to timeline.jsonl."""
        if self._is_main:
            _append(self.run_dir / TIMELINE_FILE, [{"step": step, **row}])

    def step_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """One line about a step: the metrics of STEP_LINE that it has, then seconds by phase."""
        parts = [f"{label} {metrics[name]:{form}}" for name, label, form in STEP_LINE if name in metrics]
        phases = [f"{n.removeprefix(SECONDS)} {v:.1f}s" for n, v in metrics.items() if n.startswith(SECONDS)]
        return " | ".join([f"step {step}", *parts, *([" ".join(phases)] if phases else [])])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, file: str, step: int, metrics: Mapping[str, float]) -> None:
        # JSON has no NaN: null stands for a value that is not finite.
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        _append(self.run_dir / file, [{"step": step, **values}])
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})


class PhaseTimer:
    """Wall-clock seconds by phase; a phase that runs several times adds up. Also what the process is doing now.

    synchronize: called at both ends of a phase (torch.cuda.synchronize on a GPU, where work is still
    queued when a phase's Python is over), but not after an error: queued work may wait for a rank that is gone.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []
        self.phase = "between phases"  # the one in progress, or the one that an error ended
        self.since = time.monotonic()  # when `phase` last changed

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with self.during(phase):
            start = self._now()
            end = time.perf_counter
            try:
                yield
                end = self._now
            finally:
                self.spans.append((phase, start, end()))
                self.seconds[phase] = self.seconds.get(phase, 0.0) + self.spans[-1][2] - start

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name a phase that is not timed: for the watchdog and for messages about errors."""
        outer, self.phase, self.since = self.phase, phase, time.monotonic()
        yield
        self.phase, self.since = outer, time.monotonic()  # not after an error: its message names the phase

    def take(self) -> dict[str, float]:
        """The metrics `seconds/<phase>` since the last call; starts again from zero."""
        taken = {f"{SECONDS}{phase}": seconds for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return taken

    def take_spans(self) -> list[Span]:
        """The spans that `seconds` was added up from, in order, since the last call."""
        taken, self.spans = self.spans, []
        return taken

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


class _AroundTheBar(logging.Handler):
    """Lines on stderr that leave the progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def notices_shown(*, is_main: bool) -> Iterator[None]:
    """Inside, what the package's loggers say is on stderr: from INFO on for the main process, else from WARNING."""
    logger, handler = logging.getLogger("megalong"), _AroundTheBar()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    logger.propagate = False  # a package that gives the root logger a handler would have each line twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def drop_later_steps(path: Path, *, step: int) -> None:
    """Rewrite a .jsonl file without the lines of steps after `step`; a torn last line goes too. Absent: nothing."""
    if not path.exists():
        return
    kept = [row for row in read_jsonl(path) if row["step"] <= step] if step > 0 else []
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    _append(partial, kept)
    os.replace(partial, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file. A last line without its newline was cut off while it was written: left out.

    Raises ValueError naming file and line for any other line that is not JSON.
    """
    rows = []
    # Not splitlines: it takes line separators within texts for ends of lines, too.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON line: {error}") from error
    return rows


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, steps without a finite value left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], *, weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start: the first value stays itself."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def plot_rewards(run_dir: str | Path) -> Path | None:
    """Draw overall, format and accuracy reward over the steps, raw and smoothed, to reward_curve.png.

    None, and nothing is drawn, when no step of metrics.jsonl has a reward: a run's samples may all have been dropped.
    """
    source, target = Path(run_dir) / METRICS_FILE, Path(run_dir) / "reward_curve.png"
    rows = read_jsonl(source)
    drawn = {name: title for name, title in REWARD_CURVES.items() if curve(rows, name)[0]}
    if not drawn:
        return None
    figure = Figure(figsize=(4.5 * len(drawn), 3.4), layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axis, (name, title) in zip(axes, drawn.items(), strict=True):
        steps, values = curve(rows, name)
        draw_curve(axis, steps, values, title=title)
    figure.savefig(target, dpi=120)
    return target


def draw_curve(axis: Any, steps: Sequence[int], values: Sequence[float], *, title: str) -> None:
    """A raw curve in the back and its smoothed one in front, on a matplotlib axis."""
    axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, label="raw")
    axis.plot(steps, smooth(values), color="tab:blue", linewidth=2, label="smoothed")
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.legend(loc="best")


def end_table(run_dir: str | Path) -> str:
    """Table of a finished run: first, last and mean-of-last-ten value of each main metric, then seconds by phase."""
    rows = read_jsonl(Path(run_dir) / METRICS_FILE)
    lines = [("metric", "first", "last", "mean of last 10")]
    for name, _, form in STEP_LINE:
        values = curve(rows, name)[1]
        if values:
            tail = values[-10:]
            lines.append((name, *(f"{value:{form}}" for value in (values[0], values[-1], sum(tail) / len(tail)))))
    for name, total in total_seconds(rows).items():
        lines.append((name, "", "", f"{total:,.1f} s in all"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([f"{len(rows)} steps in {run_dir}", *text])


def total_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum over the steps of every `seconds/<phase>`."""
    totals: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(SECONDS) and value is not None:
                totals[name] = totals.get(name, 0.0) + value
    return totals


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def open_wandb(run_dir: Path, config: RunConfig, *, resumes: bool) -> Any:
    """Start a W&B run, or with `resumes` continue the one whose id is kept in the run folder, which is there.

    Its step is a metric of its own: of W&B's built-in one it keeps the first values that it is given, so that steps
    which a resumed run makes again would stay those of the attempt that crashed.
    Raises ConfigError when W&B is not installed or refuses the run.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "logger.wandb=true needs the wandb package: pip install megalong[wandb], or set logger.wandb=false"
        ) from error
    id_file = run_dir / "wandb_id.txt"
    if not (resumes and id_file.exists()):
        id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
    try:
        run = wandb.init(
            project=config.logger.wandb_project,
            name=run_dir.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=cast(dict[str, Any], OmegaConf.to_container(cast(Any, config), resolve=True, enum_to_str=True)),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run
    except wandb.Error as error:  # not logged in, or not reached
        raise ConfigError(
            f"logger.wandb=true, but W&B does not start the run ({error}); log in with `wandb login`, set the "
            "environment variable WANDB_MODE=offline to write to the run folder alone, or set logger.wandb=false"
        ) from error
