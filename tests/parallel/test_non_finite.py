"""A loss or gradient that is not finite on any one rank: all ranks skip the step, count it, and stop after too many."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from faulty_runs import Watched, train, watch_all
from harness import DemoWorld, run_world

from megalong.metrics import read_jsonl

LAYOUTS = {"alone": (1, ()), "tp2": (2, ("parallel.tp=2",)), "dp2": (2, ()), "pp2": (2, ("parallel.pp=2",))}
FIVE_STEPS = ("sft.steps=5", "optimizer.max_skipped_in_a_row=2")
CASES = {
    "healthy": (FIVE_STEPS, ()),
    "loss": (FIVE_STEPS, ("poisoned_loss@2", "poisoned_loss@4")),
    "gradient": (FIVE_STEPS, ("poisoned_gradient@2",)),
    "too_many": (FIVE_STEPS, ("poisoned_loss@3", "poisoned_gradient@4")),
}
"""Name -> overrides and faults."""


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Folder of the cases, and what every rank saw of each."""
    size, overrides = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return folder, run_world(size, watch_all, demo, folder, overrides, CASES, folder=folder)


def skips(watched: Watched) -> list[bool]:
    return [stats.skipped for stats in watched.stats]


def changed(watched: Watched) -> list[bool]:
    """Whether the weights changed in each step after the first."""
    return [after != before for before, after in zip(watched.weights, watched.weights[1:], strict=False)]


def test_all_ranks_skip_the_step_and_keep_their_weights(ranks: tuple[Path, list[dict[str, Watched]]]) -> None:
    folder, seen = ranks
    for watched in seen:
        assert skips(watched["healthy"]) == [False] * 5
        assert changed(watched["healthy"]) == [True] * 4
        assert skips(watched["loss"]) == [False, True, False, True, False]
        assert changed(watched["loss"]) == [False, True, False, True]
        assert skips(watched["gradient"]) == [False, True, False, False, False]
        assert changed(watched["gradient"]) == [False, True, True, True]
        assert not math.isfinite(watched["loss"].stats[1].grad_norm)
        assert math.isfinite(watched["gradient"].stats[1].loss)
        for case in CASES:
            assert watched[case].weights == seen[0][case].weights
        assert watched["loss"].weights[0] == watched["healthy"].weights[0] != watched["healthy"].weights[-1]
    assert not math.isfinite(seen[-1]["gradient"].stats[1].grad_norm)
    rows = read_jsonl(folder / "loss" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 2, 2]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, True, False]


def test_too_many_skips_in_a_row_stop_every_rank(ranks: tuple[Path, list[dict[str, Watched]]]) -> None:
    folder, seen = ranks
    for watched in seen:
        assert watched["loss"].error == watched["gradient"].error == ""  # two skips, but not in a row
        assert skips(watched["too_many"]) == [False, False, True]
        assert "step 4, skipped as 2 in a row: loss " in watched["too_many"].error
        assert "not finite on some rank" in watched["too_many"].error
        assert "lower optimizer.lr" in watched["too_many"].error
    assert [row["skipped"] for row in read_jsonl(folder / "too_many" / "metrics.jsonl")] == [0, 0, 1]


def test_a_step_whose_samples_were_all_dropped_has_no_rewards_and_no_loss(demo: DemoWorld, tmp_path: Path) -> None:
    """Zeros would pass for measured ones, in the curve and the table of the run, too."""
    run_dir, manifest = tmp_path / "run", tmp_path / "long.jsonl"
    rows = [json.loads(line) for line in demo.rl.read_text().splitlines()]
    rows = [{**row, "problem": "word " * 800 + row["problem"]} if at >= 4 else row for at, row in enumerate(rows)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (f"data.train={manifest}", f"data.video_dir={demo.rl.parent}", "data.shuffle=false", "grpo.steps=3")
    run_world(2, train, demo, run_dir, "grpo", data, "no_checkpoints", folder=tmp_path)
    first, lost, last = read_jsonl(run_dir / "metrics.jsonl")
    measured = {"loss", "grad_norm", "entropy", "reward", "response_tokens", "truncated", "policy_lag"}
    measured.add("groups_with_spread")
    assert lost["dropped"] == 4
    assert not measured & lost.keys()
    assert measured < first.keys()
    assert measured < last.keys()
    assert (run_dir / "reward_curve.png").exists()
