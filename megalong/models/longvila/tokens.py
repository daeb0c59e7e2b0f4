"""Tokenizer and sampler side of longvila: both read the llm/ folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from megalong.models.causal_lm import empty_causal_lm
from megalong.models.chat import ChatTokens, read_chat_tokens
from megalong.models.longvila.spec import SYSTEM_PROMPT
from megalong.models.longvila.weights import LLM


def read_tokens(path: Path) -> ChatTokens:
    """Read llm/'s tokenizer; see read_chat_tokens."""
    return read_chat_tokens(path / "llm", system_prompt=SYSTEM_PROMPT)


def sampler_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' Qwen2 of llm/, without weights."""
    return empty_causal_lm(path / "llm", dtype)


def sampler_name(name: str) -> str | None:
    """Sync name to the sampler's parameter; None for the vision side, which the sampler does not have."""
    return name.removeprefix(LLM) if name.startswith(LLM) else None
