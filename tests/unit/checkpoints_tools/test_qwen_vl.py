"""Qwen-VL folders: Hugging Face -> Megatron -> Hugging Face gives every bit and every name back, old and new names."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import tiny_vl
import torch
from safetensors.torch import load_file
from tiny_checkpoints import edit_weights
from transformers import AutoModelForImageTextToText

from checkpoints_tools.compare import verify
from checkpoints_tools.convert import hf_to_megatron, megatron_to_hf
from checkpoints_tools.describe import describe
from megalong.engine.weights_io import CheckpointReader
from megalong.models.names import canonical

TENSORS = {"qwen2_5_vl": 69, "qwen3_vl": 104}


@pytest.fixture(scope="module", params=TENSORS)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Family and folder, as save_pretrained writes it."""
    return request.param, tiny_vl.WRITERS[request.param](tmp_path_factory.mktemp(request.param) / "hf")


@pytest.mark.parametrize("style", ["as saved", "the other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_gives_back_every_bit_and_name(
    stock: tuple[str, Path], tmp_path: Path, dtype: torch.dtype, style: str
) -> None:
    family, source = stock
    hf = copy_folder(source, tmp_path / "hf")
    edit_weights(
        hf / "model.safetensors",
        lambda tensors: {
            (name if style == "as saved" else other_style(name)): t.to(dtype) for name, t in tensors.items()
        },
    )
    done = hf_to_megatron(hf, tmp_path / "megatron")
    assert (done.family, done.tensors, done.dtypes) == (family, TENSORS[family], (str(dtype).removeprefix("torch."),))
    back = megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert back.carried_tensors == 0
    assert filecmp.cmp(hf / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)
    others = sorted(path.name for path in hf.iterdir() if path.suffix != ".safetensors")
    assert "preprocessor_config.json" in others
    assert filecmp.cmpfiles(hf, tmp_path / "back", others, shallow=False) == (others, [], [])
    assert verify(tmp_path / "megatron", tmp_path / "back").equal


def test_the_export_loads_in_the_stock_class(stock: tuple[str, Path], tmp_path: Path) -> None:
    _, hf = stock
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert {name: set(found) for name, found in info.items() if found} == {}
    want = AutoModelForImageTextToText.from_pretrained(hf).state_dict()
    assert want.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[name]), name


def test_both_styles_of_names_are_read(stock: tuple[str, Path], tmp_path: Path) -> None:
    _, source = stock
    hf = copy_folder(source, tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    edit_weights(hf / "model.safetensors", lambda found: {other_style(name): t for name, t in found.items()})
    assert set(load_file(hf / "model.safetensors")).isdisjoint(set(tensors) - {"lm_head.weight"})
    reader = CheckpointReader(hf, ("",))
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read(other_style(name)), tensor)


def test_inspect_knows_the_family(stock: tuple[str, Path], tmp_path: Path) -> None:
    family, hf = stock
    found = describe(hf, checksum=False)
    assert (found.kind, found.family, found.tensors) == ("hf", family, TENSORS[family])
    hf_to_megatron(hf, tmp_path / "megatron")
    assert describe(tmp_path / "megatron", checksum=False).family == family
    torch.save({}, tmp_path / "megatron/common.pt")  # as before checkpoints said it; the two have the same parts
    unsure = "qwen2_5_vl or qwen3_vl (the checkpoint does not say it)"
    assert describe(tmp_path / "megatron", checksum=False).family == unsure


def other_style(name: str) -> str:
    """model.layers and visual (Qwen2.5-VL's files) for model.language_model.layers and model.visual, or back."""
    plain = canonical(name)
    if plain != name or name == "lm_head.weight":
        return plain
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def copy_folder(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
