"""The demo checkpoint: LongVILA's layout, loadable by stock transformers classes, and a usable tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM, SiglipVisionModel

from megalong.models.longvila.demo_checkpoint import SPECIAL_TOKENS, TAG_TOKENS, DemoModelSize, make_demo_checkpoint

SIZE = DemoModelSize(
    hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, max_positions=512, vocab=400,
    tower_hidden=16, tower_layers=3, tower_heads=2, tower_intermediate=32, image=32, patch=8,
)  # fmt: skip
TEXTS = ["Which box is red?\nA. left\nB. right", "<think>The red box is left. So A.</think><answer>A</answer>"] * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_checkpoint(tmp_path_factory.mktemp("demo") / "model", texts=TEXTS, seed=1, size=SIZE)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "llm", local_files_only=True)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout_and_top_config(folder: Path) -> None:
    for name in (
        "config.json", "llm/config.json", "llm/model.safetensors", "llm/tokenizer.json", "llm/added_tokens.json",
        "vision_tower/config.json", "vision_tower/model.safetensors", "vision_tower/preprocessor_config.json",
        "mm_projector/config.json", "mm_projector/model.safetensors",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    top = read(folder / "config.json")
    assert top["model_type"] == "vila"
    assert (top["llm_cfg"], top["vision_tower_cfg"], top["mm_projector_cfg"]) == ("llm", "vision_tower", "mm_projector")
    assert (top["hidden_size"], top["mm_hidden_size"]) == (32, 16)
    assert (top["mm_vision_select_layer"], top["mm_vision_select_feature"]) == (-2, "cls_patch")
    assert top["video_encoder"]["_target_"].endswith("BasicVideoEncoder")
    projector = read(folder / "mm_projector" / "config.json")
    assert projector == {"mm_projector_type": "mlp_downsample", "model_type": "v2l_projector"}


def test_same_seed_same_bytes_other_seed_other_weights(folder: Path, tmp_path: Path) -> None:
    again = make_demo_checkpoint(tmp_path / "again", texts=TEXTS, seed=1, size=SIZE)
    assert hashes(again) == hashes(folder)
    other = make_demo_checkpoint(tmp_path / "other", texts=TEXTS, seed=2, size=SIZE)
    for part in ("llm", "vision_tower", "mm_projector"):
        name = f"{part}/model.safetensors"
        assert hashes(other)[name] != hashes(folder)[name]


def test_making_a_checkpoint_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    make_demo_checkpoint(tmp_path / "model", texts=TEXTS, seed=1, size=SIZE)
    torch.testing.assert_close(torch.rand(3), want, rtol=0, atol=0)


def test_llm_loads_as_stock_qwen2(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    llm, info = Qwen2ForCausalLM.from_pretrained(folder / "llm", output_loading_info=True, local_files_only=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    config = llm.config
    assert (config.hidden_size, config.num_hidden_layers) == (32, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.tie_word_embeddings is False
    assert config.vocab_size % 2 == 0
    assert config.vocab_size >= len(tokenizer)
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    saved = load_file(folder / "llm" / "model.safetensors")
    torch.testing.assert_close(llm.lm_head.weight, saved["lm_head.weight"], rtol=0, atol=0)
    assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def test_tower_has_published_names_and_loads_as_stock_siglip(folder: Path) -> None:
    saved = load_file(folder / "vision_tower" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in saved)
    assert saved["vision_model.embeddings.patch_embedding.weight"].shape == (16, 3, 8, 8)
    assert saved["vision_model.embeddings.position_embedding.weight"].shape == (16, 16)
    assert {name.split(".")[3] for name in saved if ".encoder.layers." in name} == {"0", "1", "2"}
    assert not any(".head." in name for name in saved)
    tower, info = SiglipVisionModel.from_pretrained(
        folder / "vision_tower", output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    assert len(loaded) == len(saved)
    for name, tensor in saved.items():
        torch.testing.assert_close(loaded[name.removeprefix("vision_model.")], tensor, rtol=0, atol=0)
    pixels = torch.zeros(2, 3, 32, 32)
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    assert hidden[-2].shape == (2, 16, 16)


def test_projector_names_and_shapes(folder: Path) -> None:
    shapes = {n: tuple(t.shape) for n, t in load_file(folder / "mm_projector" / "model.safetensors").items()}
    assert shapes == {
        "layers.1.weight": (64,), "layers.1.bias": (64,), "layers.2.weight": (32, 64), "layers.2.bias": (32,),
        "layers.4.weight": (32, 32), "layers.4.bias": (32,),
    }  # fmt: skip


def test_preprocessor_config(folder: Path) -> None:
    config = read(folder / "vision_tower" / "preprocessor_config.json")
    assert config["size"] == {"height": 32, "width": 32}
    assert config["image_mean"] == config["image_std"] == [0.5, 0.5, 0.5]
    assert config["resample"] == 3
    assert config["rescale_factor"] == pytest.approx(1 / 255)


def test_added_tokens_are_one_id_each(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = read(folder / "llm" / "added_tokens.json")
    assert set(ids) == {*SPECIAL_TOKENS, *TAG_TOKENS}
    for token, number in ids.items():
        assert tokenizer(token).input_ids == [number]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.padding_side == "left"


def test_newline_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer("\n").input_ids) == 1


def test_answer_tags_survive_skipping_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "<think>The red box is left.</think><answer>A</answer>"
    ids = tokenizer(text + "<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == text + "<|im_end|>"


@pytest.mark.parametrize(
    "text", ["", "a", " two  spaces ", "tab\tand\n\nlines\r\n", "日本語, naïve, 🎬", "x .  y ,z ?"]
)
def test_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_of_the_texts_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    for word in (" box", " red", " left"):
        assert len(tokenizer(word).input_ids) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"patch": 5}, "image=32 must be a multiple of patch=5"), ({"vocab": 260}, "vocab=260 is too small")],
)
def test_impossible_sizes_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_demo_checkpoint(tmp_path / "model", texts=TEXTS, size=replace(SIZE, **change))
