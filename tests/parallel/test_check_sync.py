"""`megalong check-sync` as a command: exit code 0 in sync, 1 and a message when the engine is not what it was sent."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiny_vl
import torch
from harness import DemoWorld, World, make_model_for_vllm

from megalong.__main__ import main
from megalong.records import WeightBucket
from megalong.rollout.embedded import EmbeddedEngine

TIMEOUT = 240.0


def command(demo: DemoWorld, run_dir: Path, overrides: tuple[str, ...], spoil_from: int | None) -> None:
    """Ends this process with the verb's exit code. spoil_from: the version from which the engine's head is wrong."""
    load_weights = EmbeddedEngine.load_weights

    def spoilt(engine: EmbeddedEngine, buckets: Iterable[WeightBucket], *, version: int) -> None:
        load_weights(engine, buckets, version=version)
        if spoil_from is not None and version >= spoil_from:
            weight = engine.model.get_output_embeddings().weight
            weight.copy_(weight.flip(0))

    EmbeddedEngine.load_weights = spoilt
    code = main(["check-sync", str(demo.recipe), *demo.overrides(run_dir, task="grpo"), *overrides])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def checked(
    demo: DemoWorld, folder: Path, *overrides: str, size: int = 1, spoil_from: int | None = None
) -> tuple[list[int], dict[str, str], str]:
    """Exit codes, the rows of the table, and all that was printed."""
    world = World(size, command, demo, folder / "run", overrides, spoil_from, folder=folder / "processes")
    codes, log = world.exit_codes(timeout=TIMEOUT), world.log()
    return codes, dict(re.findall(r"^(\S.*?)  +(\S.*)$", log, flags=re.MULTILINE)), log


def gap(rows: dict[str, str], name: str = "mean |gap|") -> float:
    return float(rows[name].split()[0])


@pytest.mark.parametrize(
    ("size", "overrides", "prompts"),
    [(1, (), 4), (2, ("parallel.tp=2",), 4), (2, (), 8), (2, ("parallel.pp=2", "mr_sp.mode=shared_prefix"), 4)],
    ids=["alone", "tp2", "dp2", "pp2"],
)
def test_in_sync(demo: DemoWorld, tmp_path: Path, size: int, overrides: tuple[str, ...], prompts: int) -> None:
    codes, rows, log = checked(demo, tmp_path, "rollout.temperature=0.8", *overrides, size=size)
    assert codes == [0] * size, log
    assert rows["weights version"] == "1"
    # Of each of 2 layers: 4 projections with 3 biases, 3 of the MLP, 2 norms; embedding, head, last norm.
    assert rows["tensors"] == "27"
    assert rows["prompts (and left out)"] == f"{prompts} (0)"
    assert rows["responses"] == str(4 * prompts)
    assert int(rows["response tokens"]) > 4 * prompts
    assert 0 < gap(rows) < 1e-5
    assert gap(rows) <= gap(rows, "max |gap|") < 1e-4
    assert -6 < float(rows["mean log-probability"]) < 0
    assert rows["greedy tokens unchanged"] == "yes"
    assert not (tmp_path / "run" / "config.yaml").exists(), "the run folder is left as it was"


@pytest.mark.parametrize("size", [1, 2])
def test_an_engine_with_another_weight_is_found(demo: DemoWorld, tmp_path: Path, size: int) -> None:
    codes, rows, log = checked(demo, tmp_path, f"parallel.tp={size}", size=size, spoil_from=0)
    assert codes == [1] * size, log
    assert gap(rows) > 0.05
    assert f"mean gap of log-probabilities is {gap(rows):.2e}, over 0.001" in log
    assert "Traceback" not in log


def test_a_second_update_that_changes_the_engine_is_found(demo: DemoWorld, tmp_path: Path) -> None:
    codes, rows, log = checked(demo, tmp_path, spoil_from=1)
    assert codes == [1], log
    assert gap(rows) < 1e-5
    assert rows["greedy tokens unchanged"] == "no"
    assert "4 of 4 greedy responses changed when the same weights were sent again" in log


def test_prompts_come_from_the_evaluation_s_manifest_where_there_is_no_other(demo: DemoWorld, tmp_path: Path) -> None:
    codes, rows, log = checked(demo, tmp_path, "data.train=???", f"eval.manifest={demo.rl}")
    assert (codes, rows["prompts (and left out)"]) == ([0], "4 (0)"), log
    codes, _, log = checked(demo, tmp_path, "data.train=???")
    assert codes == [2]
    assert "set data.train or eval.manifest" in log


def test_no_usable_prompt_is_an_error(demo: DemoWorld, tmp_path: Path) -> None:
    rows = [{**json.loads(line), "videos": ["empty.mp4"]} for line in demo.rl.read_text().splitlines()]
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "bad.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    codes, _, log = checked(demo, tmp_path, f"data.train={tmp_path}/bad.jsonl")
    assert codes == [2], log
    assert "none of the first samples can be used, for example " in log
    assert "Dropped(" not in log


NEEDS_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@NEEDS_VLLM
def test_in_sync_with_vllm(demo: DemoWorld, tmp_path: Path) -> None:
    model = make_model_for_vllm(demo, tmp_path / "model")
    vllm = ("rollout.engine=vllm", "rollout.memory_share=0.1", f"model.path={model}")
    codes, rows, log = checked(demo, tmp_path, *vllm)
    assert codes == [0], log
    assert (rows["tensors"], rows["greedy tokens unchanged"]) == ("27", "yes")
    assert 0 < gap(rows) < 1e-5
    assert torch.isfinite(torch.tensor(gap(rows, "max |gap|")))


@NEEDS_VLLM
def test_qwen3_vl_in_sync_with_vllm(tmp_path: Path) -> None:
    """Embeddings with their deepstack levels, timed steps and M-RoPE positions, as the trainer's prompts have them."""
    world = tiny_vl.make_world(tmp_path / "world", family="qwen3_vl")
    model = tiny_vl.write_qwen3_vl(tmp_path / "model", head_dim=32)
    vllm = ("rollout.engine=vllm", "rollout.memory_share=0.1", f"model.path={model}")
    codes, rows, log = checked(world, tmp_path, *vllm)
    assert codes == [0], log
    # Of each of 4 layers: 4 projections with 2 norms, 3 of the MLP, 2 norms; embedding, head, last norm.
    assert (rows["tensors"], rows["greedy tokens unchanged"]) == ("47", "yes")
    assert 0 < gap(rows) < 1e-5
    assert gap(rows, "max |gap|") < 1e-4
