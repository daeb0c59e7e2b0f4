"""RunLogger, PhaseTimer, curves and tables: what is written is read back and compared by value."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong import metrics
from megalong.config.errors import ConfigError
from megalong.config.load import load_config
from megalong.config.tree import RunConfig
from megalong.metrics import PhaseTimer, RunLogger, drop_later_steps, end_table, open_wandb, plot_rewards, read_jsonl
from megalong.records import Dropped


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\nlogger: {run_dir: r, wandb_project: long}\nseed: 7\n")
    return load_config(recipe)


def open_logger(run_dir: Path, config: RunConfig, *, wandb: bool = False, **options: Any) -> RunLogger:
    defaults: dict[str, Any] = {"tensorboard": False, "is_main": True}
    if wandb:
        run_dir.mkdir(exist_ok=True)
        defaults["wandb_run"] = open_wandb(run_dir, config, resumes="resume_step" in options)
    return RunLogger(run_dir, config=config, **{**defaults, **options})


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_metrics_reach_the_file_and_tensorboard_every_step(tmp_path: Path, config: RunConfig) -> None:
    logger = open_logger(tmp_path / "run", config, tensorboard=True)
    logger.log(1, {"reward": 0.25, "kl": 0.5})
    # Before close: both are flushed every step.
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "reward": 0.25, "kl": 0.5}]
    assert scalars(tmp_path / "run", "reward") == [(1, 0.25)]
    logger.log(2, {"reward": 0.75})
    logger.log_evaluation(2, {"strict": 0.5})
    logger.close()
    assert scalars(tmp_path / "run", "reward") == [(1, 0.25), (2, 0.75)]
    assert scalars(tmp_path / "run", "eval/strict") == [(2, 0.5)]
    assert read_jsonl(tmp_path / "run" / "evaluations.jsonl") == [{"step": 2, "eval/strict": 0.5}]


def test_a_value_that_is_not_finite_is_null_in_the_file(tmp_path: Path, config: RunConfig) -> None:
    logger = open_logger(tmp_path, config)
    logger.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-6})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 1e-06}\n'


def test_steps_must_increase(tmp_path: Path, config: RunConfig) -> None:
    logger = open_logger(tmp_path, config)
    logger.log(3, {})
    with pytest.raises(ValueError, match="step 3 cannot be logged after step 3"):
        logger.log(3, {})


def test_resume_drops_the_steps_that_are_made_again(tmp_path: Path, config: RunConfig) -> None:
    run = tmp_path / "run"
    first = open_logger(run, config, tensorboard=True)
    for step in (1, 2, 3):
        first.dropped([Dropped(sample_id=f"d{step}", stage="decode", reason="gone")])
        first.log(step, {"reward": step / 4})
        first.samples(step, [{"text": f"s{step}"}])
        first.log_evaluation(step, {"strict": step})
    first.close()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing

    second = open_logger(run, config, tensorboard=True, resume_step=2)
    second.dropped([Dropped(sample_id="again", stage="decode", reason="gone")])
    second.log(3, {"reward": 9.0})
    second.close()

    assert [(row["step"], row["reward"]) for row in read_jsonl(run / "metrics.jsonl")] == [(1, 0.25), (2, 0.5), (3, 9)]
    assert [row["text"] for row in read_jsonl(run / "samples.jsonl")] == ["s1", "s2"]
    assert [row["sample_id"] for row in read_jsonl(run / "dropped.jsonl")] == ["d1", "d2", "again"]
    assert [row["step"] for row in read_jsonl(run / "dropped.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_jsonl(run / "evaluations.jsonl")] == [1, 2]
    assert scalars(run, "reward") == [(1, 0.25), (2, 0.5), (3, 9.0)]


def test_a_fresh_start_keeps_nothing_of_an_older_run(tmp_path: Path, config: RunConfig) -> None:
    open_logger(tmp_path, config).log(5, {"reward": 1.0})
    open_logger(tmp_path, config).log(1, {"reward": 0.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.0}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON line"):
        read_jsonl(path)


def test_texts_may_hold_line_separators_and_a_torn_last_line_may_end_within_a_character(tmp_path: Path) -> None:
    rows = [{"step": step, "text": f"a\u2028b\x85c {step}"} for step in (1, 2)]
    torn = '{"step": 3, "text": "\u6c34'.encode()[:-1]
    path = tmp_path / "samples.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode() + torn)
    assert read_jsonl(path) == rows
    drop_later_steps(path, step=1)
    assert read_jsonl(path) == rows[:1]


def test_other_processes_write_nothing(tmp_path: Path, config: RunConfig) -> None:
    logger = open_logger(tmp_path / "run", config, tensorboard=True, is_main=False)
    logger.log(1, {"reward": 1.0})
    logger.log_evaluation(1, {"strict": 1.0})
    logger.samples(1, [{"a": 1}])
    logger.dropped([Dropped(sample_id="a", stage="decode", reason="b")])
    logger.decoded_elsewhere({"a.mp4": "b"})
    logger.close()
    assert not (tmp_path / "run").exists()


def test_samples_and_dropped_keep_text_as_it_is(tmp_path: Path, config: RunConfig) -> None:
    logger = open_logger(tmp_path, config)
    logger.samples(1, [{"text": "<think>né\n</think>", "reward": 1.0}])
    logger.dropped([Dropped(sample_id="v", stage="prompt", reason="too long")])
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1, "text": "<think>né\n</think>", "reward": 1.0}]
    want = {"step": 1, "sample_id": "v", "stage": "prompt", "reason": "too long"}
    assert read_jsonl(tmp_path / "dropped.jsonl") == [want]


def test_a_file_that_was_decoded_elsewhere_is_named_once_in_a_run(tmp_path: Path, config: RunConfig) -> None:
    first = open_logger(tmp_path, config)
    for step, reasons in ((1, {"a.mp4": "AV1"}), (2, {"a.mp4": "AV1", "b.mp4": "10 bits"})):
        first.decoded_elsewhere(reasons)
        first.log(step, {})
    rows = [
        {"step": 1, "path": "a.mp4", "reason": "AV1"},
        {"step": 2, "path": "b.mp4", "reason": "10 bits"},
    ]
    assert read_jsonl(tmp_path / "decoded_elsewhere.jsonl") == rows
    second = open_logger(tmp_path, config, resume_step=1)  # which finds them again
    for _ in range(2):
        second.decoded_elsewhere({"b.mp4": "10 bits", "a.mp4": "AV1"})
    assert read_jsonl(tmp_path / "decoded_elsewhere.jsonl") == rows
    open_logger(tmp_path, config).decoded_elsewhere({"b.mp4": "10 bits"})
    assert read_jsonl(tmp_path / "decoded_elsewhere.jsonl") == [{**rows[1], "step": 1}]


def test_what_an_evaluation_leaves_out_is_of_its_own_step(tmp_path: Path, config: RunConfig) -> None:
    """A run that continues from the step does not evaluate it again."""
    first = open_logger(tmp_path, config)
    first.log(1, {})
    first.dropped([Dropped(sample_id="d", stage="decode", reason="gone")], 1)
    first.decoded_elsewhere({"a.mp4": "AV1"}, 1)
    open_logger(tmp_path, config, resume_step=1)
    assert [row["sample_id"] for row in read_jsonl(tmp_path / "dropped.jsonl")] == ["d"]
    assert [row["path"] for row in read_jsonl(tmp_path / "decoded_elsewhere.jsonl")] == ["a.mp4"]


def test_step_line(tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    step = {
        "reward": 0.5,
        "reward/accuracy": 0.25,
        "kl": 0.0125,
        "entropy": 1.5,
        "response_tokens": 33.25,
        "sampler_gap_sum": 0.001,
        "sampler_gap_max": 0.02,
        "grad_norm": 0.75,
        "tokens_per_second": 12345.6,
        "seconds/rollout": 1.25,
        "seconds/train": 2.5,
        "unknown": 1.0,
    }
    want = (
        "step 7 | reward 0.500 | acc 0.250 | kl 0.0125 | entropy 1.500 | len 33.2 | gap 0.0010 | gap max 0.0200 | "
        "grad 0.750 | tok/s 12,346 | rollout 1.2s train 2.5s"
    )
    logger = open_logger(tmp_path, config)
    assert logger.step_line(7, step) == want
    assert logger.step_line(8, {}) == "step 8"
    logger.log(7, step)
    assert capsys.readouterr().out == want + "\n"


def test_phases_add_up_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    calls: list[str] = []
    timer = PhaseTimer(synchronize=lambda: calls.append("sync"))
    with timer("rollout"):
        assert calls == ["sync"]
    with timer("rollout"):
        pass
    assert timer.take() == {"seconds/rollout": 3.5}
    assert len(calls) == 4
    with pytest.raises(RuntimeError, match="inside"), timer("train"):
        raise RuntimeError("inside")
    assert timer.take() == {"seconds/train": 1.0}
    assert timer.take() == {}


def test_smooth_is_a_corrected_moving_average() -> None:
    assert metrics.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert metrics.smooth([1.0, 3.0], weight=0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])


def test_reward_curve_is_drawn(tmp_path: Path, config: RunConfig) -> None:
    logger = open_logger(tmp_path, config)
    for step in range(1, 21):
        logger.log(step, {"reward": step / 20, "reward/format": 1.0, "reward/accuracy": step / 40})
    picture = matplotlib.image.imread(plot_rewards(tmp_path))
    assert picture.shape[0] > 300
    assert picture.shape[1] > 1000
    # Ink of the curves' own colour in each third: three panels, each with its curve.
    blue = (abs(picture[..., :3] - [31 / 255, 119 / 255, 180 / 255]) < 0.02).all(-1)
    third = picture.shape[1] // 3
    assert all(blue[:, i * third : (i + 1) * third].sum() > 200 for i in range(3))


def test_without_rewards_no_curve_is_drawn(tmp_path: Path, config: RunConfig) -> None:
    open_logger(tmp_path, config).log(1, {"loss": 1.0})
    assert plot_rewards(tmp_path) is None
    assert not (tmp_path / "reward_curve.png").exists()


def test_end_table(tmp_path: Path, config: RunConfig) -> None:
    logger = open_logger(tmp_path, config)
    for step in range(1, 13):
        logger.log(step, {"reward": float(step), "seconds/train": 0.5, "seconds/rollout": 1.0})
    lines = [line.split() for line in end_table(tmp_path).splitlines()]
    assert lines[0][:2] == ["12", "steps"]
    assert lines[2] == ["reward", "1.000", "12.000", "7.500"]
    assert lines[3:] == [["seconds/train", "6.0", "s", "in", "all"], ["seconds/rollout", "12.0", "s", "in", "all"]]


def test_missing_wandb_names_the_extra(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install megalong\[wandb\]"):
        open_logger(tmp_path, config, wandb=True)


def test_wandb_without_a_login_says_what_to_do(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError) as caught:
        open_logger(tmp_path / "run", config, wandb=True)
    assert str(caught.value) == (
        "logger.wandb=true, but W&B does not start the run (No API key configured. Use `wandb login` to log in.); log "
        "in with `wandb login`, set the environment variable WANDB_MODE=offline to write to the run folder alone, or "
        "set logger.wandb=false"
    )


def test_wandb_gets_config_metrics_the_same_id_on_resume_and_another_for_a_new_start(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []
    defined: list[tuple[str, str | None]] = []
    finished: list[bool] = []
    run = types.SimpleNamespace(
        log=logged.append,  # without step=: W&B leaves out what comes with one below its own
        define_metric=lambda name, step_metric=None: defined.append((name, step_metric)),
        finish=lambda: finished.append(True),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: started.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)

    first = open_logger(tmp_path / "run", config, wandb=True)
    first.log(1, {"reward": 0.5})
    first.log(2, {"reward": 0.25})
    first.close()
    second = open_logger(tmp_path / "run", config, wandb=True, resume_step=1)
    second.log_evaluation(1, {"strict": 1.0})
    second.log(2, {"reward": 0.75})
    second.close()
    open_logger(tmp_path / "run", config, wandb=True).close()

    again = [{"step": 1, "eval/strict": 1.0}, {"step": 2, "reward": 0.75}]
    assert logged == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.25}, *again]
    assert defined == [("step", None), ("*", "step")] * 3
    assert finished == [True] * 3
    assert started[0]["project"] == "long"
    assert started[0]["config"]["seed"] == 7
    assert started[0]["config"]["model"]["dtype"] == "bfloat16"
    assert started[0]["id"] == started[1]["id"] != started[2]["id"]
    assert started[1]["resume"] == "allow"


def test_wandb_offline(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for folder in ("CACHE", "CONFIG", "DATA"):  # its own files, in the home folder otherwise
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / folder.lower()))
    logger = open_logger(tmp_path / "run", config, wandb=True)
    logger.log(1, {"reward": 0.5})
    logger.close()
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    deadline = time.monotonic() + 20  # W&B's own process writes the file shortly after finish()
    while b"reward" not in files[0].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"reward" in files[0].read_bytes()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 1, "reward": 0.5}
