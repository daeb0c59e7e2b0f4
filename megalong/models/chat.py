"""Tokenizer side of a family: ids are read from the checkpoint, never hard-coded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from megalong.models.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTokens:
    """What the sequence builder and the samplers need of a tokenizer."""

    encode: Callable[[str], list[int]]  # of text from outside: what spells a special token stays text
    encode_markup: Callable[[str], list[int]]  # of the chat format: special tokens are recognised, none are added
    decode: Callable[[Sequence[int]], str]  # special tokens left out
    eos_id: int  # ends an assistant turn
    system_prompt: str  # "": the family's chat format has no system turn


def read_chat_tokens(folder: Path, *, system_prompt: str) -> ChatTokens:
    """The tokenizer in `folder`, for ChatML turns. Raises CheckpointError when a chat marker is not one token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_markup(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for token in ("<|im_start|>", "<|im_end|>"):
        if len(encode_markup(token)) != 1:
            raise CheckpointError(f"{folder}: {token!r} must be one token, this tokenizer gives {encode_markup(token)}")
    return ChatTokens(
        encode=encode,
        encode_markup=encode_markup,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        eos_id=encode_markup("<|im_end|>")[0],
        system_prompt=system_prompt,
    )
