"""Tokenizer side of a family: ids are read from the checkpoint, never hard-coded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from megalong.models.errors import CheckpointError
from megalong.models.json_files import load_json

PLACEHOLDERS = ("<vila/sentinel>", "<image>", "<vila/video>")
"""VILA's tokens for an answer, a picture and a video, which no embedding is looked up for: their ids may be larger."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
"""Of a fast and of a slow tokenizer of the Qwen families; one of them is enough."""


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
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make an empty tokenizer
        raise CheckpointError(f"{folder}: no tokenizer; expected {' or '.join(TOKENIZER_FILES)}, below model.path")
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


def check_added_tokens(folder: Path, *, vocab: int) -> None:
    """Raise CheckpointError for an id in the folder's added_tokens.json without a row in the embedding.

    Newer tokenizers have no such file. vocab: rows of the embedding.
    """
    file = folder / "added_tokens.json"
    if not file.is_file():
        return
    for token, id_ in load_json(file).items():
        if type(id_) is not int or id_ < 0:
            raise CheckpointError(f"{file}: token {token!r} has id {id_!r}, expected an integer from 0")
        if id_ >= vocab and token not in PLACEHOLDERS:
            raise CheckpointError(
                f"{file}: token {token!r} has id {id_}, but the embedding has {vocab} rows (vocab_size in "
                "config.json): vocabulary mismatch; take the tokenizer that came with the weights"
            )
