"""Every bad input is refused with the file and the tensor in the message, and nothing is written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import edit_weights, split_llm

from checkpoints_tools.convert import hf_to_megatron, megatron_to_hf
from checkpoints_tools.errors import ConvertError
from checkpoints_tools.megatron_folder import MegatronFolder

LLM = "llm/model.safetensors"
INDEX = "llm/model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def set_weight_map(hf: Path, name: str, file_name: str) -> None:
    split_llm(hf)
    index = json.loads((hf / INDEX).read_text())
    index["weight_map"][name] = file_name
    (hf / INDEX).write_text(json.dumps(index))


def missing(hf: Path) -> None:
    edit_weights(hf / LLM, lambda tensors: {name: t for name, t in tensors.items() if name != UP})


def unexpected(hf: Path) -> None:
    edit_weights(hf / LLM, lambda tensors: {**tensors, "model.layers.9.bias": torch.zeros(2)})


def misshaped(hf: Path) -> None:
    edit_weights(hf / LLM, lambda tensors: {**tensors, UP: torch.zeros(64, 33)})


def wrong_dtype(hf: Path) -> None:
    edit_weights(hf / LLM, lambda tensors: {**tensors, UP: tensors[UP].half()})


def integers(hf: Path) -> None:
    edit_weights(hf / LLM, lambda tensors: {**tensors, UP: tensors[UP].to(torch.int8)})


def mixed_dtypes(hf: Path) -> None:
    edit_weights(hf / LLM, lambda tensors: {**tensors, UP: tensors[UP].bfloat16()})


def vocabulary(hf: Path) -> None:
    edit_json(hf / "llm/config.json", vocab_size=512)


def tied_with_a_head(hf: Path) -> None:
    edit_json(hf / "llm/config.json", tie_word_embeddings=True)


def truncated(hf: Path) -> None:
    content = (hf / LLM).read_bytes()
    (hf / LLM).write_bytes(content[:-100])


def pickled(hf: Path) -> None:
    (hf / "llm/pytorch_model-00001-of-00002.bin").write_bytes(b"")


def traversal(hf: Path) -> None:
    shutil.copy(hf / "vision_tower/model.safetensors", hf / "outside.safetensors")
    set_weight_map(hf, UP, "../outside.safetensors")
    (hf / "outside.safetensors").unlink()


def absolute(hf: Path) -> None:
    set_weight_map(hf, UP, str(hf / "vision_tower/model.safetensors"))


def duplicate_in_shards(hf: Path) -> None:
    split_llm(hf)
    edit_weights(hf / "llm/model-00001-of-00002.safetensors", lambda tensors: {**tensors, UP: torch.zeros(64, 32)})


def duplicate_in_index(hf: Path) -> None:
    split_llm(hf)
    text = (hf / INDEX).read_text()
    (hf / INDEX).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{UP}": "model-00001-of-00002.safetensors", ')
    )


def missing_in_shard(hf: Path) -> None:
    split_llm(hf)
    file = hf / "llm/model-00002-of-00002.safetensors"
    edit_weights(file, lambda tensors: {name: t for name, t in tensors.items() if name != UP})


def not_in_index(hf: Path) -> None:
    split_llm(hf)
    edit_weights(hf / "llm/model-00001-of-00002.safetensors", lambda tensors: {**tensors, "extra": torch.zeros(2)})


def both_prefixes(hf: Path) -> None:
    norm = "post_layernorm.weight"
    edit_weights(hf / "vision_tower/model.safetensors", lambda tensors: {**tensors, norm: torch.ones(16)})


def two_weight_files(hf: Path) -> None:
    shutil.copy(hf / LLM, hf / "kept")
    split_llm(hf)
    shutil.move(hf / "kept", hf / LLM)


def carried_is_missing(hf: Path) -> None:
    edit_weights(
        hf / "vision_tower/model.safetensors",
        lambda tensors: {name: t for name, t in tensors.items() if "post_layernorm.bias" not in name},
    )


def unknown_layout(hf: Path) -> None:
    shutil.rmtree(hf / "mm_projector")


def weights_at_the_root(hf: Path) -> None:
    save_file({"a": torch.zeros(1)}, hf / "model.safetensors")


def config_key_is_missing(hf: Path) -> None:
    config = json.loads((hf / "llm/config.json").read_text())
    del config["intermediate_size"]
    (hf / "llm/config.json").write_text(json.dumps(config))


def added_token_behind_the_vocabulary(hf: Path) -> None:
    edit_json(hf / "llm/added_tokens.json", **{"<|im_end|>": 999})


def added_token_without_an_id(hf: Path) -> None:
    edit_json(hf / "llm/added_tokens.json", **{"<|im_end|>": "7"})


CASES: dict[Callable[[Path], None], str] = {
    missing: rf"hf: tensor 'llm/{UP}' is missing \(it fills llm\.decoder\.layers\.1\.mlp\.linear_fc1\.weight\)",
    unexpected: rf"{LLM}: unexpected tensor 'model\.layers\.9\.bias'",
    misshaped: rf"{LLM}: tensor '{UP}' has shape \[64, 33\], expected \[64, 32\]",
    wrong_dtype: rf"{LLM}: tensor '{UP}' has dtype torch\.float16, expected float32 or bfloat16 \(or give --dtype\)",
    integers: rf"{LLM}: tensor '{UP}' has dtype torch\.int8, expected float32 or bfloat16",
    mixed_dtypes: rf"{LLM}: tensor '{UP}' is torch\.bfloat16, but others .* are torch\.float32; give --dtype",
    vocabulary: rf"{LLM}: tensor '.*' has shape .*: vocabulary mismatch, llm/config\.json says vocab_size=512",
    tied_with_a_head: rf"{LLM}: unexpected tensor 'lm_head\.weight'",
    truncated: rf"{LLM}: not a complete safetensors file",
    pickled: r"llm/pytorch_model-00001-of-00002\.bin: pickled weights are refused",
    traversal: rf"{INDEX}: tensor '{UP}' points at '\.\./outside\.safetensors', which is not a safetensors file of",
    absolute: rf"{INDEX}: tensor '{UP}' points at '/.*', which is not a safetensors file of that folder",
    duplicate_in_shards: rf"00001-of-00002\.safetensors: tensor '{UP}' is stored twice",
    duplicate_in_index: rf"{INDEX}: '{UP}' is listed twice",
    missing_in_shard: rf"00002-of-00002\.safetensors: tensor '{UP}' is missing",
    not_in_index: r"00001-of-00002\.safetensors: unexpected tensor 'extra', which model\.safetensors\.index\.json does",
    both_prefixes: r"vision_tower/model\.safetensors: tensor '.*post_layernorm\.weight' is stored a second time",
    two_weight_files: r"llm: both model\.safetensors and model\.safetensors\.index\.json are there",
    carried_is_missing: r"tensor 'vision_tower/post_layernorm\.bias' is missing",
    unknown_layout: r"hf: the layout of no known family \(longvila: folders llm, vision_tower, mm_projector; ",
    weights_at_the_root: r"hf/model\.safetensors: weights are expected in llm, vision_tower, mm_projector",
    added_token_behind_the_vocabulary: r"llm/added_tokens\.json: token '<\|im_end\|>' has id 999, but the embedding",
    added_token_without_an_id: r"llm/added_tokens\.json: token '<\|im_end\|>' has id '7', expected an integer from 0",
    config_key_is_missing: r"llm/config\.json: key 'intermediate_size' is missing",
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_bad_hugging_face_folder(hf: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(hf)
    with pytest.raises(ConvertError, match=CASES[spoil]):
        hf_to_megatron(hf, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_placeholder_needs_no_row_of_the_embedding(hf: Path, tmp_path: Path) -> None:
    edit_json(hf / "llm/added_tokens.json", **{"<image>": 998, "<vila/video>": 999})
    assert hf_to_megatron(hf, tmp_path / "out").tensors == 68


def test_a_narrow_dtype_is_accepted_with_an_explicit_dtype(hf: Path, tmp_path: Path) -> None:
    wrong_dtype(hf)
    assert hf_to_megatron(hf, tmp_path / "out", dtype=torch.float32).dtypes == ("float32",)


def cut_shard(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def no_shard(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def damaged_shard(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))


def no_description(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def other_format(folder: Path) -> None:
    edit_json(folder / "metadata.json", sharded_backend="zarr")


class RunsCode:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('code was run')",))


def pickled_code(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(RunsCode()))


def change_metadata(folder: Path, change: Callable[[object], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def points_outside(folder: Path) -> None:
    def change(metadata: object) -> None:
        next(iter(metadata.storage_data.values())).relative_path = "../hf/llm/model.safetensors"

    change_metadata(folder, change)


def lacks_a_tensor(folder: Path) -> None:
    change_metadata(
        folder, lambda metadata: metadata.state_dict_metadata.pop("llm.decoder.layers.mlp.linear_fc2.weight")
    )


def lacks_a_chunk(folder: Path) -> None:
    def change(metadata: object) -> None:
        metadata.state_dict_metadata["llm.decoder.layers.mlp.linear_fc2.weight"].chunks.pop()

    change_metadata(folder, change)


MEGATRON_CASES: dict[Callable[[Path], None], str] = {
    cut_shard: r"__0_0\.distcp is cut short \(\d+ bytes\): it should hold vision\.projector",
    no_shard: r"__0_0\.distcp is missing: it should hold llm\.embedding\.word_embeddings\.weight \[0, 0\]",
    damaged_shard: r"llm\.embedding\.word_embeddings\.weight in __0_0\.distcp cannot be read",
    no_description: r"megatron: neither a megatron checkpoint nor a folder with step_<n> checkpoints",
    other_format: r"metadata\.json: sharded_backend is 'zarr'; only 'torch_dist' can be read",
    pickled_code: r"\.metadata: cannot be read \(builtins\.exec does not belong into a checkpoint's metadata\)",
    points_outside: r"llm\.embedding.* points at '\.\./hf/llm/model\.safetensors', outside the folder",
    lacks_a_tensor: r"'llm\.decoder\.layers\.mlp\.linear_fc2\.weight' is missing \(it becomes llm/model\.layers\.0",
    lacks_a_chunk: r"linear_fc2\.weight at \[1, 0, 0\]: the shards hold 0 of 2048 elements",
}


@pytest.mark.parametrize("spoil", MEGATRON_CASES, ids=lambda case: case.__name__)
def test_bad_megatron_folder(hf: Path, megatron: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(megatron)
    with pytest.raises(ConvertError, match=MEGATRON_CASES[spoil]):
        megatron_to_hf(megatron, hf, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def drop_last_row(hf: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(hf / LLM, lambda tensors: {n: t[:-1] if n in names else t for n, t in tensors.items()})
    edit_json(hf / "llm/config.json", vocab_size=json.loads((hf / "llm/config.json").read_text())["vocab_size"] - 1)


def add_row(hf: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(hf / LLM, lambda tensors: {n: torch.cat((t, t[:1])) if n in names else t for n, t in tensors.items()})
    edit_json(hf / "llm/config.json", vocab_size=json.loads((hf / "llm/config.json").read_text())["vocab_size"] + 1)


def fewer_layers(hf: Path) -> None:
    edit_weights(hf / LLM, lambda tensors: {name: t for name, t in tensors.items() if "layers.1." not in name})
    edit_json(hf / "llm/config.json", num_hidden_layers=1)


def tied(hf: Path) -> None:
    edit_weights(hf / LLM, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    edit_json(hf / "llm/config.json", tie_word_embeddings=True)


LIKE_CASES: dict[Callable[[Path], None], str] = {
    drop_last_row: r"rows and those from \d+ are not padding: vocabulary mismatch with vocab_size=\d+",
    add_row: r"word_embeddings\.weight' has \d+ rows: vocabulary mismatch with vocab_size=\d+",
    fewer_layers: r"linear_qkv\.weight' has shape \[2, 64, 32\], expected \[1, 64, 32\]",
    tied: r"unexpected tensor 'llm\.output_layer\.weight'",
}


@pytest.mark.parametrize("spoil", LIKE_CASES, ids=lambda case: case.__name__)
def test_checkpoint_of_another_model(hf: Path, megatron: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(hf)
    with pytest.raises(ConvertError, match=LIKE_CASES[spoil]):
        megatron_to_hf(megatron, hf, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_existing_target_is_never_touched(hf: Path, megatron: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for convert in (
        lambda: hf_to_megatron(hf, tmp_path / "out"),
        lambda: megatron_to_hf(megatron, hf, tmp_path / "out"),
    ):
        with pytest.raises(ConvertError, match="out: exists already"):
            convert()
    assert list((tmp_path / "out").iterdir()) == []


def test_checkpoints_of_training_pass_the_metadata_check(demo_megatron: Path) -> None:
    folder = MegatronFolder(demo_megatron)
    assert folder.shape("llm.decoder.layers.mlp.linear_fc2.weight") == (2, 32, 64)
    assert folder.dtype("llm.decoder.layers.mlp.linear_fc2.weight") == torch.float32
