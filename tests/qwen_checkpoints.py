"""Tiny random checkpoints of the text families, in the layout of a stock Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

STOCK = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen2_5": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 97,  # odd: tensor parallelism has to pad
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "dtype": "float32",
}


def write_qwen(
    folder: Path, family: str, *, tokenizer: PreTrainedTokenizerBase | None = None, **changes: Any
) -> PreTrainedModel:
    """Write weights and config, and the tokenizer if given; returns transformers' model.

    Every tensor is random, so that no bias or norm hides behind 0 or 1. qwen3's head_dim is not hidden / heads.
    """
    config_class, model_class = STOCK[family]
    sizes = {**SIZES, **({"head_dim": 16} if family == "qwen3" else {}), **changes}
    if tokenizer is not None:
        sizes["vocab_size"] = len(tokenizer) | 1
        sizes["eos_token_id"] = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = model_class(config_class(**sizes)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            width = 0.2 if parameter.ndim < 2 else 0.15
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * width)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model
