"""Stock checkpoints of every family but longvila (test_round_trip has it) come back from training at any split.

Converted, loaded over the ranks, saved by them and exported: the same bytes, and stock classes load them.
"""

from __future__ import annotations

import filecmp
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_vl
import torch
from harness import run_world
from megatron.core import parallel_state
from qwen_checkpoints import STOCK, write_qwen
from tiny_checkpoints import edit_weights
from transformers import AutoModelForImageTextToText

from checkpoints_tools.compare import verify
from checkpoints_tools.convert import hf_to_megatron, megatron_to_hf
from checkpoints_tools.describe import describe
from megalong.config.tree import Dtype, ModelConfig, OptimizerConfig
from megalong.engine.build import build_model
from megalong.engine.checkpoint import load_weights, save_checkpoint
from megalong.engine.trainer import Trainer
from megalong.parallel.layout import make_layout


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    dtype: Dtype
    changes: dict[str, Any] = field(default_factory=dict)  # of the text families' config.json


CASES = {
    "qwen2 tied": Case(family="qwen2", dtype=Dtype.bfloat16, changes={"tie_word_embeddings": True}),
    "qwen2_5, one key head": Case(family="qwen2_5", dtype=Dtype.bfloat16, changes={"num_key_value_heads": 1}),
    "qwen3": Case(family="qwen3", dtype=Dtype.float32),
    "qwen2_5_vl": Case(family="qwen2_5_vl", dtype=Dtype.float32),
    "qwen3_vl": Case(family="qwen3_vl", dtype=Dtype.bfloat16),
}
SPLITS = {2: [(2, 1), (1, 2)], 4: [(2, 2)]}
"""Processes -> (tp, pp)."""


def write(folder: Path, case: Case) -> Path:
    if case.family in STOCK:
        write_qwen(folder, case.family, **case.changes)
    else:
        tiny_vl.WRITERS[case.family](folder)
    dtype = getattr(torch, case.dtype.value)
    edit_weights(folder / "model.safetensors", lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    return folder


def load_and_save(folder: Path, splits: list[tuple[int, int]]) -> None:
    """On one of the ranks: every case at every split."""
    for tp, pp in splits:
        layout = make_layout(tp=tp, cp=1, pp=pp, seed=1)
        for name, case in CASES.items():
            config = ModelConfig(family=case.family, path=str(folder / name / "hf"), dtype=case.dtype)
            model = build_model(config, layout, sequence_parallel=False)
            with torch.no_grad():
                for param in model.parameters():
                    param.fill_(7)
            trainer = Trainer(model, layout, OptimizerConfig(), total_steps=1, embeddings=lambda _: None)
            load_weights(folder / name / "megatron", trainer)
            save_checkpoint(folder / name / f"run_tp{tp}_pp{pp}", trainer, extra={}, keep=1)
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("size", SPLITS)
def test_what_the_ranks_save_exports_to_the_same_bytes(tmp_path: Path, size: int) -> None:
    for name, case in CASES.items():
        hf_to_megatron(write(tmp_path / name / "hf", case), tmp_path / name / "megatron")
    run_world(size, load_and_save, tmp_path, SPLITS[size], folder=tmp_path / "world")
    for name, case in CASES.items():
        hf, first = tmp_path / name / "hf", tmp_path / name / "megatron"
        for tp, pp in SPLITS[size]:
            run, back = tmp_path / name / f"run_tp{tp}_pp{pp}", tmp_path / name / f"back_tp{tp}_pp{pp}"
            done = megatron_to_hf(run, hf, back)
            assert done.dtypes == (case.dtype.value,)
            assert filecmp.cmp(hf / "model.safetensors", back / "model.safetensors", shallow=False), (name, tp, pp)
            assert verify(run, first, like=hf).equal
            assert describe(run, checksum=False).family == case.family
        stock = STOCK[case.family][1] if case.family in STOCK else AutoModelForImageTextToText
        _, info = stock.from_pretrained(back, output_loading_info=True)
        assert {key: set(found) for key, found in info.items() if found} == {}
