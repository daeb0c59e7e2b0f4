"""The weight table of the text families: the plain names of a stock checkpoint."""

from __future__ import annotations

from megalong.models.qwen.spec import QwenSpec
from megalong.models.weights import Entry, decoder_table


def weight_table(spec: QwenSpec, vision: None, *, use_te: bool) -> list[Entry]:
    """Every tensor of the model; the sampler has the same names."""
    return decoder_table(
        spec.gpt, use_te=use_te, megatron_prefix="llm.", hf_prefix="model.", head_name="lm_head.weight"
    )
