"""A damaged checkpoint folder ends in a CheckpointError that names the file and the tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalong.config.tree import Dtype, ModelConfig
from megalong.engine.build import build_model
from megalong.engine.weights_io import CheckpointReader, load_hf_weights
from megalong.models.errors import CheckpointError

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def shard_llm(folder: Path) -> Path:
    """Split llm/ into two files and an index, as large checkpoints are; returns the index."""
    tensors = load_file(folder / "llm" / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / "llm" / f"part{number}.safetensors")
        weight_map.update(dict.fromkeys(part, f"part{number}.safetensors"))
    (folder / "llm" / "model.safetensors").unlink()
    index = folder / "llm" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def change_index(index: Path, name: str, file_name: object) -> None:
    content = json.loads(index.read_text())
    content["weight_map"][name] = file_name
    index.write_text(json.dumps(content))


def build(folder: Path, layout: object) -> torch.nn.Module:
    return build_model(ModelConfig(path=str(folder), dtype=Dtype.float32), layout, sequence_parallel=False)


def test_sharded_and_single_files_give_the_same_model(folder: Path, layout: object, tiny_checkpoint: Path) -> None:
    shard_llm(folder)
    want = build(tiny_checkpoint, layout).state_dict()
    got = build(folder, layout).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want if isinstance(want[name], torch.Tensor))


def test_tower_names_are_found_with_and_without_their_prefix(folder: Path) -> None:
    file = folder / "vision_tower" / "model.safetensors"
    want = load_file(file)["vision_model.embeddings.patch_embedding.bias"]
    prefixed = CheckpointReader(folder, ["vision_tower"])
    save_file({name.removeprefix("vision_model."): tensor for name, tensor in load_file(file).items()}, file)
    plain = CheckpointReader(folder, ["vision_tower"])
    for reader in (prefixed, plain):
        for name in ("vision_model.embeddings.patch_embedding.bias", "embeddings.patch_embedding.bias"):
            assert torch.equal(reader.read(f"vision_tower/{name}"), want)


def test_missing_tensor(folder: Path, layout: object) -> None:
    file = folder / "llm" / "model.safetensors"
    tensors = load_file(file)
    del tensors[GATE]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"tensor 'llm/{GATE}' is in none of the safetensors files of llm/"):
        build(folder, layout)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (GATE, (48, 31)),
        ("model.embed_tokens.weight", (300, 32)),
        ("model.layers.0.self_attn.q_proj.weight", (30, 32)),
        ("model.layers.0.self_attn.k_proj.bias", (8,)),
        ("model.norm.weight", (64,)),
    ],
)
def test_wrong_shape(folder: Path, layout: object, name: str, shape: tuple[int, ...]) -> None:
    file = folder / "llm" / "model.safetensors"
    tensors = load_file(file)
    want = list(tensors[name].shape)
    save_file({**tensors, name: torch.zeros(shape)}, file)
    with pytest.raises(CheckpointError) as caught:
        build(folder, layout)
    assert str(caught.value) == (
        f"{file}: tensor 'llm/{name}' is {list(shape)}, but the sizes in config.json ask for {want}"
    )


@pytest.mark.parametrize("kept", [0.5, 0.0001, 0.0], ids=["half a file", "part of its header", "empty"])
def test_truncated_file(folder: Path, layout: object, kept: float) -> None:
    file = folder / "mm_projector" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=rf"{file}: not a whole safetensors file.*copy or download it again"):
        build(folder, layout)


def test_truncated_shard(folder: Path, layout: object) -> None:
    shard_llm(folder)
    file = folder / "llm" / "part1.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{file}: not a whole safetensors file"):
        build(folder, layout)


@pytest.mark.parametrize("target", ["../mm_projector/model.safetensors", "/etc/hostname", "absent.safetensors", 7, ""])
def test_index_that_points_outside_its_folder_or_nowhere(folder: Path, target: object) -> None:
    index = shard_llm(folder)
    change_index(index, GATE, target)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder, ["llm"])
    assert str(caught.value) == f"{index}: tensor {GATE!r} points at {target!r}, which is not a file of the folder"


def test_index_that_points_at_the_wrong_shard(folder: Path) -> None:
    index = shard_llm(folder)
    right = json.loads(index.read_text())["weight_map"][GATE]
    wrong = {"part0.safetensors": "part1.safetensors", "part1.safetensors": "part0.safetensors"}[right]
    change_index(index, GATE, wrong)
    reader = CheckpointReader(folder, ["llm"])
    with pytest.raises(CheckpointError, match=rf"{wrong}: the index says that tensor 'llm/{GATE}' is in this file"):
        reader.read(f"llm/{GATE}")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', "{}"])
def test_bad_index(folder: Path, content: str) -> None:
    index = shard_llm(folder)
    index.write_text(content)
    with pytest.raises(CheckpointError, match=str(index)):
        CheckpointReader(folder, ["llm"])


def test_folder_without_weights(folder: Path) -> None:
    (folder / "llm" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"llm: neither model\.safetensors nor model\.safetensors\.index\.json"):
        CheckpointReader(folder, ["llm"])


def test_table_that_leaves_a_parameter_out(folder: Path, layout: object) -> None:
    model = build(folder, layout)
    with pytest.raises(ValueError, match=r"does not fill \['llm\.output_layer\.weight'\]"):
        load_hf_weights(
            model,
            [entry for entry in model.weight_table() if entry.megatron != "llm.output_layer.weight"],
            CheckpointReader(folder, ["llm", "vision_tower", "mm_projector"]),
            layout,
        )
