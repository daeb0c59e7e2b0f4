"""Tokenizer side of qwen3_vl: its chat format has no system turn of its own."""

from __future__ import annotations

from pathlib import Path

from megalong.models.chat import ChatTokens, read_chat_tokens


def read_tokens(path: Path) -> ChatTokens:
    """The folder's tokenizer; see read_chat_tokens."""
    return read_chat_tokens(path, system_prompt="")
