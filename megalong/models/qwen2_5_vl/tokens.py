"""Tokenizer and sampler side of qwen2_5_vl."""

from __future__ import annotations

from pathlib import Path

from megalong.models.chat import ChatTokens, read_chat_tokens

SYSTEM_PROMPT = "You are a helpful assistant."


def read_tokens(path: Path) -> ChatTokens:
    """The folder's tokenizer; see read_chat_tokens."""
    return read_chat_tokens(path, system_prompt=SYSTEM_PROMPT)
