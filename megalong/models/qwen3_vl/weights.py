"""The weight table of qwen3_vl, in the names of published checkpoints: model.language_model.*, model.visual.*."""

from __future__ import annotations

from torch import nn

from megalong.models.qwen3_vl.spec import Qwen3VlSpec
from megalong.models.weights import Entry, Replicated, decoder_table

LLM, VISION = "model.language_model.", "model."


def weight_table(spec: Qwen3VlSpec, vision: nn.Module, *, use_te: bool) -> list[Entry]:
    """Every tensor of the model, LLM first. Tower and mergers are replicated over tensor-parallel ranks."""
    table = decoder_table(spec.gpt, use_te=use_te, megatron_prefix="llm.", hf_prefix=LLM, head_name="lm_head.weight")
    # The encoder's only child is `visual`.
    table += [Replicated(megatron=f"vision.{name}", hf=(VISION + name,)) for name, _ in vision.named_parameters()]
    return table
