"""Stock text checkpoints: a round trip gives every bit back, and the export loads in stock classes."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch
from qwen_checkpoints import STOCK, write_qwen
from tiny_checkpoints import all_tensors, edit_weights

from checkpoints_tools.compare import verify
from checkpoints_tools.convert import hf_to_megatron, megatron_to_hf
from checkpoints_tools.describe import describe
from checkpoints_tools.families import FILES
from checkpoints_tools.places import family_of_folder
from megalong.config.shapes import SHAPE_READERS
from megalong.models.families import FAMILIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # qwen2_5 has qwen2's files
def test_round_trip_loads_in_stock_classes(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    write_qwen(hf, family, tie_word_embeddings=tied)
    edit_weights(hf / "model.safetensors", lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    assert family_of_folder(hf) == family
    written = hf_to_megatron(hf, tmp_path / "megatron")
    done = megatron_to_hf(tmp_path / "megatron", hf, back)
    assert (done.tensors, done.carried_tensors) == (len(all_tensors(hf)), 0)
    assert done.weight_files == ("model.safetensors",)
    assert written.num_bytes == done.num_bytes
    before, after = all_tensors(hf), all_tensors(back)
    assert before.keys() == after.keys()
    assert ("model.safetensors:lm_head.weight" in before) is not tied
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype
        assert torch.equal(tensor, after[name]), name
    others = [path.name for path in hf.iterdir() if path.name != "model.safetensors"]
    assert filecmp.cmpfiles(hf, back, others, shallow=False) == (others, [], [])
    model, info = STOCK[family][1].from_pretrained(back, output_loading_info=True)
    assert {name: set(found) for name, found in info.items() if found} == {}
    want = STOCK[family][1].from_pretrained(hf).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    assert verify(tmp_path / "megatron", back).equal
    assert describe(tmp_path / "megatron").family == family


def test_shards_are_cut_anew_and_read_again(tmp_path: Path) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    write_qwen(hf, "qwen3")
    hf_to_megatron(hf, tmp_path / "megatron")
    done = megatron_to_hf(tmp_path / "megatron", hf, back, shard_bytes=10_000)
    assert len(done.weight_files) > 2
    assert verify(hf, back).equal
    hf_to_megatron(back, tmp_path / "again")
    assert verify(tmp_path / "megatron", tmp_path / "again").equal


def test_every_family_has_its_lines() -> None:
    assert FILES.keys() == FAMILIES.keys() == SHAPE_READERS.keys()
