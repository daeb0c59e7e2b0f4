"""Tokenizer side of longvila: ids are read from the checkpoint, never hard-coded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megalong.models.errors import CheckpointError
from megalong.models.longvila.spec import SYSTEM_PROMPT


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTokens:
    """What the sequence builder and the samplers need of a tokenizer."""

    encode: Callable[[str], list[int]]  # special tokens in the text are recognised, none are added
    decode: Callable[[Sequence[int]], str]  # special tokens left out
    eos_id: int
    newline_id: int
    system_prompt: str


def read_tokens(path: Path) -> ChatTokens:
    """Read llm/'s tokenizer. Raises CheckpointError when a chat token is missing or a newline is not one token."""
    tokenizer = AutoTokenizer.from_pretrained(path / "llm", trust_remote_code=False)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for token in ("<|im_start|>", "<|im_end|>", "\n"):
        if len(encode(token)) != 1:
            raise CheckpointError(f"{path}/llm: {token!r} must be one token, this tokenizer gives {encode(token)}")
    return ChatTokens(
        encode=encode,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        eos_id=encode("<|im_end|>")[0],
        newline_id=encode("\n")[0],
        system_prompt=SYSTEM_PROMPT,
    )


def sampler_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' LLM with the checkpoint's config and no weights of its own: they arrive by weight sync."""
    config = AutoConfig.from_pretrained(path / "llm", trust_remote_code=False)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
