"""The vLLM engine on a GPU: captured decoding steps, and weights that are thrown away between two updates."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import tiny_vl
import torch
from harness import DemoWorld, World

from megalong.__main__ import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def check_sync(demo: DemoWorld, run_dir: Path, overrides: tuple[str, ...]) -> None:
    """Ends this process with the verb's exit code."""
    code = main(["check-sync", str(demo.recipe), *demo.overrides(run_dir, task="grpo"), *overrides])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def test_qwen3_vl_in_sync(tmp_path: Path) -> None:
    """Deepstack levels are there after a sleep, and nothing of them is left where captured steps read them."""
    demo = tiny_vl.make_world(tmp_path / "world", family="qwen3_vl")
    model = tiny_vl.write_qwen3_vl(tmp_path / "model", head_dim=64)
    overrides = (
        f"model.path={model}", "model.dtype=bfloat16", "model.attention=plain", "video.decoder=pyav",
        "rollout.engine=vllm", "rollout.placement=colocated", "rollout.memory_share=0.2", "rollout.cuda_graphs=true",
    )  # fmt: skip
    world = World(1, check_sync, demo, tmp_path / "run", overrides, folder=tmp_path)
    codes, log = world.exit_codes(timeout=600), world.log()
    rows = dict(re.findall(r"^(\S.*?)  +(\S.*)$", log, flags=re.MULTILINE))
    assert codes == [0], log  # a mean gap of at most 0.02 in bfloat16
    assert (rows["tensors"], rows["greedy tokens unchanged"]) == ("47", "yes")
