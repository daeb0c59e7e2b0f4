"""The golden run: SFT, then GRPO from its weights, on the command line. The same seed gives the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
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
