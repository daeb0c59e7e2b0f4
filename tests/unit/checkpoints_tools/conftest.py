"""A tiny LongVILA-layout checkpoint, made once, and copies of it that tests change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import SIZE, edit_weights

from checkpoints_tools.convert import hf_to_megatron
from megalong.models.longvila.demo_checkpoint import make_demo_checkpoint


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random float32 weights, an odd vocabulary, untied; with a remote-code file and a generation config."""
    folder = make_demo_checkpoint(tmp_path_factory.mktemp("demo") / "hf", texts=["a b c d e"], size=SIZE)
    config = json.loads((folder / "llm/config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        # Values everywhere, for biases and norms start constant; and one row of the vocabulary more.
        for file in sorted(folder.rglob("*.safetensors")):
            edit_weights(
                file, lambda tensors: {name: randomised(t, config["vocab_size"]) for name, t in tensors.items()}
            )
    config["vocab_size"] += 1
    (folder / "llm/config.json").write_text(json.dumps(config))
    (folder / "modeling_vila.py").write_text("raise SystemExit('remote code was run')\n")
    return folder


def randomised(tensor: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.randn(tensor.shape[0] + (tensor.shape[0] == vocab), *tensor.shape[1:])


@pytest.fixture
def hf(demo: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(demo, tmp_path / "hf"))


@pytest.fixture(scope="session")
def demo_megatron(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo_megatron") / "megatron"
    hf_to_megatron(demo, out)
    return out


@pytest.fixture
def megatron(demo_megatron: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(demo_megatron, tmp_path / "megatron"))
