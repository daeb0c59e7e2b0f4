"""A tiny random-weight checkpoint in LongVILA's on-disk layout, for the demo and the tests.

config.json   llm/ (Qwen2, tokenizer)   vision_tower/ (SigLIP)   mm_projector/ (2x2 space-to-depth MLP)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)

# Order and flags as in LongVILA's tokenizer; ids follow the learnt vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "[BOS]",
    "[PAD]",
    "<vila/sentinel>",
    "<image>",
    "<vila/video>",
)
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""One token each, but not special: decoding with special tokens removed keeps them, as the rewards need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoModelSize:
    """Sizes of the demo model; every LLM size divides by 2, for tensor parallelism."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    max_positions: int = 4096
    vocab: int = 640
    """Upper bound; the corpus may need fewer merges."""
    tower_hidden: int = 64
    tower_layers: int = 3
    """The last one is skipped, as LongVILA does (mm_vision_select_layer -2)."""
    tower_heads: int = 4
    tower_intermediate: int = 128
    image: int = 48
    patch: int = 8


def make_demo_checkpoint(
    out_dir: Path, *, texts: Iterable[str], seed: int = 1, size: DemoModelSize | None = None
) -> Path:
    """Write the checkpoint folder and return it; the same arguments give the same bytes.

    texts: what the byte-level BPE vocabulary is learnt from. Weights are float32 and random.
    """
    size = size or DemoModelSize()
    if size.image % size.patch:
        raise ValueError(f"image={size.image} must be a multiple of patch={size.patch}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_llm(out_dir / "llm", tokenizer, size)
        write_tower(out_dir / "vision_tower", size)
        write_projector(out_dir / "mm_projector", size)
    write_json(out_dir / "config.json", top_config(size))
    return out_dir


def train_tokenizer(texts: Iterable[str], *, size: DemoModelSize) -> Qwen2Tokenizer:
    """Byte-level BPE learnt from `texts` by Qwen2's rules (NFC, word split), with Qwen2's and VILA's added tokens."""
    added = (*SPECIAL_TOKENS, *TAG_TOKENS)
    if size.vocab < 256 + len(added):
        raise ValueError(f"vocab={size.vocab} is too small: 256 bytes and {len(added)} added tokens must fit")
    rules = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab - len(added),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Added tokens never reach the BPE when encoding, so it must not spend merges on them.
    markers = re.compile("|".join(re.escape(token) for token in added))
    learner.train_from_iterator((piece for text in texts for piece in markers.split(text)), trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=size.max_positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAG_TOKENS])
    return tokenizer


def write_llm(folder: Path, tokenizer: Qwen2Tokenizer, size: DemoModelSize) -> None:
    """Stock Qwen2 weights and config, and the tokenizer files beside them."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL_TOKENS, *TAG_TOKENS)}
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.max_positions,
        # The usual 0.02 fits widths of thousands; a narrow net learns sooner from unit-scale projections.
        initializer_range=0.5 / math.sqrt(size.hidden),
        tie_word_embeddings=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        dtype="float32",
    )
    llm = Qwen2ForCausalLM(config)
    llm.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "added_tokens.json", ids)


def write_tower(folder: Path, size: DemoModelSize) -> None:
    """SigLIP without its pooling head, names starting with `vision_model.`, and its preprocessor."""
    config = SiglipVisionConfig(
        hidden_size=size.tower_hidden,
        intermediate_size=size.tower_intermediate,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_heads,
        image_size=size.image,
        patch_size=size.patch,
        vision_use_head=False,
        dtype="float32",
    )
    tower = SiglipVisionModel(config)
    # SigLIP's own 1/sqrt(width) drowns in the patch content of a narrow tower: nothing would know where it looks.
    position_ND = next(t for name, t in tower.named_parameters() if name.endswith("position_embedding.weight"))
    torch.nn.init.normal_(position_ND, std=1.0)
    folder.mkdir(parents=True, exist_ok=True)
    # Written by hand: transformers 5 drops the `vision_model.` that published checkpoints have in every name.
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["SiglipVisionModel"]
    config.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", preprocessor_config(size))


def preprocessor_config(size: DemoModelSize) -> dict:
    """What SiglipImageProcessor reads: bicubic resize to the tower's square, then (x / 255 - 0.5) / 0.5."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size.image, "width": size.image},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def write_projector(folder: Path, size: DemoModelSize) -> None:
    """LayerNorm(4c), Linear(4c, h), GELU, Linear(h, h) as layers 1, 2, 4 (0 and 3 have no weights)."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = 4 * size.tower_hidden
    tensors = {
        "layers.1.weight": torch.ones(wide),
        "layers.1.bias": torch.zeros(wide),
        "layers.2.weight": torch.randn(size.hidden, wide) / math.sqrt(wide),
        "layers.2.bias": torch.zeros(size.hidden),
        "layers.4.weight": torch.randn(size.hidden, size.hidden) / math.sqrt(size.hidden),
        "layers.4.bias": torch.zeros(size.hidden),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"mm_projector_type": "mlp_downsample", "model_type": "v2l_projector"})


def top_config(size: DemoModelSize) -> dict:
    """The root config.json: the parts are named by their folders."""
    return {
        "model_type": "vila",
        "version": "2.0",
        "architectures": ["VILAForCausalLM"],
        "llm_cfg": "llm",
        "vision_tower_cfg": "vision_tower",
        "mm_projector_cfg": "mm_projector",
        "hidden_size": size.hidden,
        "mm_hidden_size": size.tower_hidden,
        "image_aspect_ratio": "resize",
        "num_video_frames": 8,
        "fps": 0.0,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
        "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder"},
        "model_dtype": "torch.float32",
        "chat_template": None,
        "interpolate_mode": "linear",
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
