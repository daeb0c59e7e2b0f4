"""The model families, one entry each: a folder with spec, tokens and weights and, with vision, tower and layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers import PreTrainedModel

from megalong.config.tree import VideoConfig
from megalong.models.causal_lm import empty_causal_lm
from megalong.models.chat import ChatTokens, read_chat_tokens
from megalong.models.longvila import layout as longvila_layout
from megalong.models.longvila import spec as longvila_spec
from megalong.models.longvila import tokens as longvila_tokens
from megalong.models.longvila import tower as longvila_tower
from megalong.models.longvila import weights as longvila_weights
from megalong.models.policy import PolicyModel
from megalong.models.qwen import spec as qwen_spec
from megalong.models.qwen import weights as qwen_weights
from megalong.models.qwen2_5_vl import layout as qwen2_5_vl_layout
from megalong.models.qwen2_5_vl import sampler as qwen2_5_vl_sampler
from megalong.models.qwen2_5_vl import spec as qwen2_5_vl_spec
from megalong.models.qwen2_5_vl import tokens as qwen2_5_vl_tokens
from megalong.models.qwen2_5_vl import tower as qwen2_5_vl_tower
from megalong.models.qwen2_5_vl import weights as qwen2_5_vl_weights
from megalong.models.qwen3_vl import layout as qwen3_vl_layout
from megalong.models.qwen3_vl import sampler as qwen3_vl_sampler
from megalong.models.qwen3_vl import spec as qwen3_vl_spec
from megalong.models.qwen3_vl import tokens as qwen3_vl_tokens
from megalong.models.qwen3_vl import tower as qwen3_vl_tower
from megalong.models.qwen3_vl import weights as qwen3_vl_weights
from megalong.models.weights import Entry


@dataclass(frozen=True, kw_only=True, slots=True)
class Vision:
    """The vision side of a family."""

    encoder: Callable[[Any], nn.Module]  # spec -> encoder, see PolicyModel
    layout: Callable[[Any, ChatTokens, VideoConfig], Any]  # (spec, tokens, config.video) -> data's VideoLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the rest of megalong asks of a family."""

    name: str
    read_spec: Callable[[Path], Any]  # sizes from the checkpoint folder's JSON; has .path and .gpt
    vision: Vision | None
    weight_table: Callable[..., list[Entry]]  # (spec, encoder or None, use_te=) -> every tensor of the model
    weight_folders: tuple[str, ...]
    """Sub-folders that hold safetensors; names are `<folder>/<tensor>`. "" is the checkpoint folder itself, whose
    tensors keep their plain names: a stock Hugging Face checkpoint. The first one holds the LLM and the tokenizer."""
    read_tokens: Callable[[Path], ChatTokens]  # tokenizer and the ids a prompt needs
    sampler_model: Callable[[Path, torch.dtype], PreTrainedModel]  # transformers LLM without weights
    sampler_name: Callable[[str], str | None]  # sync name -> the sampler's parameter; None: not a part of it

    def build(
        self, config: TransformerConfig, spec: Any, *, use_te: bool, core_attention: Callable[..., Any]
    ) -> PolicyModel:
        """The module, weights not loaded."""
        encoder = None if self.vision is None else self.vision.encoder(spec)
        table = self.weight_table(spec, encoder, use_te=use_te)
        return PolicyModel(
            config, spec, family=self.name, vision=encoder, table=table, use_te=use_te, core_attention=core_attention
        )


def _qwen_text(name: str, *, model_type: str) -> Family:
    return Family(
        name=name,
        read_spec=partial(qwen_spec.read_spec, model_type=model_type),
        vision=None,
        weight_table=qwen_weights.weight_table,
        weight_folders=("",),
        read_tokens=partial(read_chat_tokens, system_prompt=qwen_spec.SYSTEM_PROMPTS[name]),
        sampler_model=empty_causal_lm,
        sampler_name=str,  # the sync names are the sampler's own
    )


_ALL = (
    Family(
        name="longvila",
        read_spec=longvila_spec.read_spec,
        vision=Vision(encoder=longvila_tower.VisionEncoder, layout=longvila_layout.video_layout),
        weight_table=longvila_weights.weight_table,
        weight_folders=("llm", "vision_tower", "mm_projector"),
        read_tokens=longvila_tokens.read_tokens,
        sampler_model=longvila_tokens.sampler_model,
        sampler_name=longvila_tokens.sampler_name,
    ),
    Family(
        name="qwen2_5_vl",
        read_spec=qwen2_5_vl_spec.read_spec,
        vision=Vision(encoder=qwen2_5_vl_tower.VisionEncoder, layout=qwen2_5_vl_layout.video_layout),
        weight_table=qwen2_5_vl_weights.weight_table,
        weight_folders=("",),
        read_tokens=qwen2_5_vl_tokens.read_tokens,
        sampler_model=qwen2_5_vl_sampler.sampler_model,
        sampler_name=qwen2_5_vl_sampler.sampler_name,
    ),
    Family(
        name="qwen3_vl",
        read_spec=qwen3_vl_spec.read_spec,
        vision=Vision(encoder=qwen3_vl_tower.VisionEncoder, layout=qwen3_vl_layout.video_layout),
        weight_table=qwen3_vl_weights.weight_table,
        weight_folders=("",),
        read_tokens=qwen3_vl_tokens.read_tokens,
        sampler_model=qwen3_vl_sampler.sampler_model,
        sampler_name=qwen3_vl_sampler.sampler_name,
    ),
    _qwen_text("qwen2", model_type="qwen2"),
    _qwen_text("qwen2_5", model_type="qwen2"),
    _qwen_text("qwen3", model_type="qwen3"),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
