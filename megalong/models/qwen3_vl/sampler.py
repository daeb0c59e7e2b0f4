"""The LLM of qwen3_vl as a transformers causal LM, for the rollout engines: no tower, positions given."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, Qwen3VLConfig, Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel, Qwen3VLTextModel

from megalong.models.qwen2_5_vl.sampler import Generates
from megalong.models.qwen3_vl.weights import LLM


class Sampler(Generates, Qwen3VLPreTrainedModel, GenerationMixin):
    """Takes embeddings or ids, and positions [B, T] or [3, B, T]."""

    config: Qwen3VLTextConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Qwen3VLTextConfig) -> None:
        super().__init__(config)
        self.model = Qwen3VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def sampler_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The sampler with the checkpoint's config and no weights of its own: they arrive by weight sync.

    Its config also says what vLLM cannot know from the LLM's part of the file: `num_deepstack`, the levels that stand
    behind each vision embedding, and that M-RoPE is interleaved.
    """
    config = Qwen3VLConfig.from_pretrained(path)
    text = config.text_config
    text.tie_word_embeddings = config.tie_word_embeddings
    text.num_deepstack = len(config.vision_config.deepstack_visual_indexes)
    text.rope_parameters["mrope_interleaved"] = True  # whether the file says so or not
    return Sampler._from_config(text, dtype=dtype)


def sampler_name(name: str) -> str | None:
    """Sync name to the sampler's parameter; None for the vision side, which the sampler does not have."""
    if name.startswith(LLM):
        return "model." + name.removeprefix(LLM)
    return name if name == "lm_head.weight" else None
