"""Tiny random checkpoints of the stock Qwen-VL models, as save_pretrained writes them, with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import DemoWorld, ask_twice
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from megalong.config.demo_data import DemoDataConfig, DemoQuestionsConfig
from megalong.data.demo_videos import make_demo_data
from megalong.data.manifest import read_manifest
from megalong.data.sequence import THINKING_TEMPLATE
from megalong.models.longvila.demo_checkpoint import DemoModelSize, train_tokenizer

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEXTS = ("what is shown", "<1.5 seconds><2.0 seconds>", "You are a helpful assistant.", "system user assistant")
PATCH = 4
"""Pixels; four patches are a block of 8 x 8 pixels, an embedding."""


def write_qwen2_5_vl(
    folder: Path, *, texts: Iterable[str] = (), tied: bool = False, seed: int = 5, hidden: int = 32
) -> Path:
    """Two decoder layers, three tower blocks of which one has full attention; windows of 2 x 2 embeddings."""
    tokenizer = make_tokenizer(texts)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*VISION_TOKENS, "<|im_end|>")}
    text = {
        "vocab_size": len(tokenizer) + 1 - len(tokenizer) % 2,  # odd, so that tensor parallelism has to pad
        "hidden_size": hidden, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [hidden // 32, hidden // 32, hidden // 16]
        },
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": hidden,
        "patch_size": PATCH, "window_size": 4 * PATCH, "fullatt_block_indexes": [1], "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, dtype="float32", **marker_ids(ids)
    )
    torch.manual_seed(seed)
    finish(Qwen2_5_VLForConditionalGeneration(config), end=ids["<|im_end|>"], folder=folder)
    tokenizer.save_pretrained(folder)
    write_preprocessor(folder, image_processor_type="Qwen2VLImageProcessor")
    return folder


def write_qwen3_vl(
    folder: Path, *, texts: Iterable[str] = (), tied: bool = False, seed: int = 6, head_dim: int = 16
) -> Path:
    """Four decoder layers, the first two with deepstack embeddings; heads wider than hidden / heads."""
    tokenizer = make_tokenizer(texts)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*VISION_TOKENS, "<|im_end|>")}
    text = {
        "vocab_size": len(tokenizer) + 1 - len(tokenizer) % 2,
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [head_dim // 4, head_dim // 8, head_dim // 8]
        },
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
        "patch_size": PATCH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, dtype="float32", **marker_ids(ids)
    )
    torch.manual_seed(seed)
    finish(Qwen3VLForConditionalGeneration(config), end=ids["<|im_end|>"], folder=folder)
    tokenizer.save_pretrained(folder)
    block = (2 * PATCH) ** 2
    shared = {
        "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3
    }  # fmt: skip
    for name, most in (("preprocessor_config.json", 12 * block), ("video_preprocessor_config.json", 60 * block)):
        size = {"shortest_edge": 4 * block, "longest_edge": most}
        (folder / name).write_text(json.dumps({"size": size, **shared}))
    return folder


def make_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level tokenizer with Qwen's chat and vision markers."""
    tokenizer = train_tokenizer((*TEXTS, *texts), size=DemoModelSize(vocab=500, max_positions=4096))
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in VISION_TOKENS])
    return tokenizer


def marker_ids(ids: dict[str, int]) -> dict[str, int]:
    """The keys of config.json that say where pictures and videos stand."""
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def write_preprocessor(folder: Path, **extra: Any) -> None:
    """preprocessor_config.json in the form of published Qwen2.5-VL checkpoints."""
    content = {
        "min_pixels": 4 * (2 * PATCH) ** 2, "max_pixels": 12 * (2 * PATCH) ** 2, "patch_size": PATCH,
        "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], **extra,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@torch.no_grad()
def finish(model: PreTrainedModel, *, end: int, folder: Path) -> None:
    """Random weights, written; an untied head has a long row for the end token, so that responses end."""
    randomise(model)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight[end] *= 4
    model.save_pretrained(folder)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Every tensor random, so that no bias or norm hides behind 0 or 1."""
    for name, parameter in model.named_parameters():
        is_norm = name.endswith("weight") and ("norm" in name or "ln_q" in name)
        parameter.copy_(float(is_norm) + torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.15))


RECIPE = """
model: {{family: {family}, path: {model}, dtype: float32, layer_spec: local, recompute: none, train_tower: true,
         train_projector: true}}
video: {{num_frames: 5, tower_batch_frames: 4, cache_embeddings: false, cache_gib: 0.1, frame_cache_gib: 0.1}}
data: {{max_prompt_tokens: 900, max_response_tokens: 150, pack_tokens: 1300, decode_workers: 1}}
rollout: {{engine: embedded, group_size: 4, batch_prompts: 2}}
reward: {{weights: {{accuracy: 0.9, format: 0.1}}}}
optimizer: {{lr: 3.0e-3, eps: 1.0e-4, clip_grad: 1.0}}
sft: {{steps: 2, batch_size: 5}}
grpo: {{steps: 2, batch_size: 4}}
checkpoint: {{save_every: 0}}
logger: {{tensorboard: false, samples_per_step: 1000}}
"""


def make_world(folder: Path, *, family: str) -> DemoWorld:
    """Four questions per manifest about short videos, one more about two pictures, and a tiny checkpoint."""
    data = make_demo_data(
        folder / "data",
        DemoDataConfig(questions=DemoQuestionsConfig(train_sft=4, train_rl=4, heldout=1, per_video=1)),
    )
    samples = read_manifest(data.train_sft, video_dir=None)
    generator = np.random.default_rng(4)
    for name, height in (("a.png", 40), ("b.png", 24)):
        Image.fromarray(generator.integers(0, 256, (height, 32, 3), dtype=np.uint8)).save(data.train_sft.parent / name)
    question = {"problem": "What is shown?", "answer": "noise", "reasoning": "look", "images": ["a.png", "b.png"]}
    data.train_sft.write_text(f"{json.dumps(question)}\n{data.train_sft.read_text()}")
    texts = [THINKING_TEMPLATE, *(f"{sample.question} {sample.reasoning}" for sample in samples)]
    model = WRITERS[family](folder / "model", texts=texts)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(family=family, model=model), encoding="utf-8")
    pairs = ask_twice(data.train_rl)
    return DemoWorld(folder=folder, recipe=recipe, sft=data.train_sft, rl=data.train_rl, pairs=pairs, tied=model)


WRITERS = {"qwen2_5_vl": write_qwen2_5_vl, "qwen3_vl": write_qwen3_vl}


@contextmanager
def float64_towers() -> Iterator[None]:
    """The stock towers rotate, and Qwen2.5-VL's normalises, in float32 whatever they are given.

    And they round gradients on the way back. Inside this context they compute in the dtype of their input.
    """
    with ExitStack() as stack:
        for module in (modeling_qwen2_5_vl, modeling_qwen3_vl):
            wide = as_given(module.apply_rotary_pos_emb_vision)
            stack.enter_context(mock.patch.object(module, "apply_rotary_pos_emb_vision", wide))
        norm = modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm
        stack.enter_context(mock.patch.object(norm, "forward", normalise))
        yield


def as_given(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate_wide(*args: Tensor) -> tuple[Tensor, Tensor]:
        with mock.patch.object(Tensor, "float", lambda tensor: tensor):
            return rotate(*args)

    return rotate_wide


def normalise(norm: modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm, hidden: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
