"""The golden run: SFT, then GRPO from its weights, on the command line. The same seed gives the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from harness import DemoWorld

from megalong.metrics import read_jsonl

BOTH_STAGES = """
import sys
from megalong.__main__ import main
from megalong.parallel.layout import destroy_layout

cut = sys.argv.index("--")
if __name__ == "__main__":
    codes = [main(["sft", *sys.argv[1:cut]])]
    destroy_layout()
    codes.append(main(["grpo", *sys.argv[cut + 1 :]]))
    sys.exit(max(codes))
"""
SFT_STEPS, GRPO_STEPS = 4, 3


def start(demo: DemoWorld, folder: Path, *, hash_seed: str) -> subprocess.Popen:
    """Both stages in one fresh process. hash_seed: the order of sets of strings, which no result may depend on."""
    folder.mkdir()
    script = folder / "both_stages.py"
    script.write_text(BOTH_STAGES, encoding="utf-8")
    sft = [*demo.overrides(folder / "sft", task="sft"), f"sft.steps={SFT_STEPS}"]
    grpo = [
        *demo.overrides(folder / "grpo", task="grpo"),
        f"model.init_from={folder / 'sft' / 'checkpoints'}",
        f"grpo.steps={GRPO_STEPS}",
        "grpo.updates_per_batch=2",
        "model.recompute=full",
    ]
    command = [sys.executable, "-W", "ignore", str(script), str(demo.recipe), *sft, "--", str(demo.recipe), *grpo]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def twice(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two runs that differ in nothing but where they are."""
    parent = tmp_path_factory.mktemp("golden")
    folders = [parent / "one", parent / "two"]
    processes = [start(demo, folder, hash_seed=str(seed)) for seed, folder in enumerate(folders)]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join((folder / "log").read_text()[-4000:] for folder in folders)
    return folders


def rows(path: Path) -> list[dict]:
    timed = ("seconds/", "tokens_per_second")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in read_jsonl(path)]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_same_seed_gives_the_same_metrics(stage: str, twice: list[Path]) -> None:
    one, two = (rows(folder / stage / "metrics.jsonl") for folder in twice)
    assert one == two
    steps = {"sft": list(range(1, SFT_STEPS + 1)), "grpo": [2 * step for step in range(1, GRPO_STEPS + 1)]}
    assert [row["step"] for row in one] == steps[stage]
    assert all(row["grad_norm"] > 1e-3 and row["skipped"] == 0 for row in one)
    assert len({row["loss"] for row in one}) == len(one)


def test_the_same_seed_gives_the_same_rollouts(twice: list[Path]) -> None:
    one, two = (rows(folder / "grpo" / "samples.jsonl") for folder in twice)
    assert one == two
    assert len(one) == GRPO_STEPS * 4 * 4
    assert len({row["response"] for row in one}) > 10
    assert len({row["reward"] for row in one}) > 3


def test_the_sampler_has_the_weights_that_are_trained(twice: list[Path]) -> None:
    """The policy that samples is the one that is trained, step after step; and SFT did learn."""
    assert all(row["sampler_gap_max"] < 1e-3 for row in rows(twice[0] / "grpo" / "metrics.jsonl"))
    losses = [row["loss"] for row in rows(twice[0] / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_what_was_chosen_is_said_once(twice: list[Path]) -> None:
    """Not once per pack or layer; what each stage chooses by itself, once for each."""
    log = (twice[0] / "log").read_text()
    kernel = "attention of torch.float32, heads 8 wide, on cpu: cpu_flash, the fastest that takes them"
    assert log.count(f"{kernel}; equal to the definition here\n") == log.count("attention of ") == 1
    assert log.count("log-probabilities of torch.float32 on cpu: plain\n") == 1
    assert log.count("videos are decoded by pyav (video.decoder=auto)\n") == 2
    assert log.count("responses are sampled in the training processes (rollout.engine=embedded)\n") == 2


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_timeline_holds_the_seconds_of_the_metrics(stage: str, twice: list[Path]) -> None:
    folder = twice[0] / stage
    lines = read_jsonl(folder / "timeline.jsonl")
    metrics = {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl")}
    assert [line["step"] for line in lines] == list(metrics)
    for line in lines:
        by_lane: dict[str, list[dict]] = {}
        for span in line["spans"]:
            assert span["begin"] <= span["end"]
            by_lane.setdefault(span["lane"], []).append(span)
        for spans in by_lane.values():  # in order, one after the other
            assert all(one["end"] <= two["begin"] for one, two in pairwise(spans))
        main = sorted((s for s in line["spans"] if s["lane"] != "decoding ahead"), key=lambda span: span["begin"])
        assert main[0]["begin"] == 0
        assert all(one["end"] <= two["begin"] for one, two in pairwise(main))  # one process, lanes or not
        seconds = {name: value for name, value in metrics[line["step"]].items() if name.startswith("seconds/")}
        summed = {name: sum(s["end"] - s["begin"] for s in main if f"seconds/{s['phase']}" == name) for name in seconds}
        assert summed == pytest.approx(seconds, abs=1e-6)
        assert 0.9 * line["seconds"] <= sum(seconds.values()) <= line["seconds"] + 1e-6
    assert any(span["lane"] == "decoding ahead" for line in lines for span in line["spans"])
    assert (folder / "timeline.png").stat().st_size > 5_000
