"""The LLM of qwen2_5_vl as a transformers causal LM, for the embedded rollout engine: no tower, positions given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel, Qwen2_5_VLTextModel


class Generates:
    """The causal LM's part that both Qwen-VL samplers share: `model` and `lm_head` are theirs."""

    def forward(
        self, input_ids: Tensor | None = None, *, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, logits_to_keep: int = 0,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits [B, T, V] of the last `logits_to_keep` tokens, 0: of all."""
        out = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **inputs)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


class Sampler(Generates, Qwen2_5_VLPreTrainedModel, GenerationMixin):
    """Takes embeddings or ids, and positions [B, T] or [3, B, T]."""

    config: Qwen2_5_VLTextConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Qwen2_5_VLTextConfig) -> None:
        super().__init__(config)
        self.model = Qwen2_5_VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def sampler_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The sampler with the checkpoint's config and no weights of its own: they arrive by weight sync."""
    config = Qwen2_5_VLConfig.from_pretrained(path)
    text = config.text_config
    text.tie_word_embeddings = config.tie_word_embeddings
    return Sampler._from_config(text, dtype=dtype)


def sampler_name(name: str) -> str | None:
    """Sync name to the sampler's parameter; None for the vision side, which the sampler does not have."""
    return None if name.startswith("visual.") else name
