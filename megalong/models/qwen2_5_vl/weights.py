"""The weight table of qwen2_5_vl, in the names of published checkpoints: model.*, lm_head.weight and visual.*.

Files with the names of transformers' modules (model.language_model.*, model.visual.*) are read as well, see
models/names.py.
"""

from __future__ import annotations

from torch import nn

from megalong.models.qwen2_5_vl.spec import Qwen25VlSpec
from megalong.models.weights import Entry, Replicated, decoder_table


def weight_table(spec: Qwen25VlSpec, vision: nn.Module, *, use_te: bool) -> list[Entry]:
    """Every tensor of the model, LLM first. Tower and merger are replicated over tensor-parallel ranks."""
    table = decoder_table(
        spec.gpt, use_te=use_te, megatron_prefix="llm.", hf_prefix="model.", head_name="lm_head.weight"
    )
    # The encoder's only child is `visual`, so its names are the file's.
    table += [Replicated(megatron=f"vision.{name}", hf=(name,)) for name, _ in vision.named_parameters()]
    return table
