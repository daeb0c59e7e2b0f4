"""The vLLM engine on a GPU: captured decoding steps, and weights that are thrown away between two updates."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny_vl
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


MODELS = {
    # Deepstack levels are there after a sleep, and nothing of them is left where captured steps read them.
    "qwen3_vl": (partial(tiny_vl.write_qwen3_vl, head_dim=64), "47"),
    "qwen2_5_vl": (partial(tiny_vl.write_qwen2_5_vl, hidden=256), "27"),
}
"""Family -> a model whose heads are as wide as vLLM's attention takes them, and its LLM's tensors."""


@pytest.mark.parametrize("family", MODELS)
def test_sampler_and_trainer_in_sync(family: str, tmp_path: Path) -> None:
    write, num_tensors = MODELS[family]
    demo = tiny_vl.make_world(tmp_path / "world", family=family)
    model = write(tmp_path / "model")
    overrides = (
        f"model.path={model}", "model.dtype=bfloat16", "model.attention=plain", "video.decoder=pyav",
        "rollout.engine=vllm", "rollout.placement=colocated", "rollout.memory_share=0.2", "rollout.cuda_graphs=true",
    )  # fmt: skip
    # A process of its own: this one has used CUDA, and what it forks cannot.
    done = subprocess.run(
        [
            sys.executable, "-m", "megalong", "check-sync", str(demo.recipe),
            *demo.overrides(tmp_path / "run", task="grpo"), *overrides,
        ],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    rows = dict(re.findall(r"^(\S.*?)  +(\S.*)$", done.stdout, flags=re.MULTILINE))
    assert done.returncode == 0, done.stdout + done.stderr  # a mean gap of at most 0.02 in bfloat16
    assert (rows["tensors"], rows["greedy tokens unchanged"]) == (num_tensors, "yes")
