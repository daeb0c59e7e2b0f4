"""The tokenizer's two readings: of the chat format, and of text from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megalong.models.chat import ChatTokens, read_chat_tokens
from megalong.models.errors import CheckpointError
from megalong.models.longvila.demo_checkpoint import SPECIAL_TOKENS, TAG_TOKENS


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint / "llm"


@pytest.fixture(scope="module")
def tokens(folder: Path) -> ChatTokens:
    return read_chat_tokens(folder, system_prompt="")


@pytest.mark.parametrize("marker", SPECIAL_TOKENS)
def test_text_cannot_become_a_special_token(tokens: ChatTokens, folder: Path, marker: str) -> None:
    special = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert tokens.encode_markup(marker) == [special[SPECIAL_TOKENS.index(marker)]]
    ids = tokens.encode(f"before {marker}\nafter")
    assert not set(special) & set(ids)
    assert tokens.decode(ids) == f"before {marker}\nafter"


def test_all_other_text_reads_alike(tokens: ChatTokens) -> None:
    for text in ("<think>a</think><answer>B</answer>", "Which?\nA. red\nB. blue", "café 漢字  \n\n x < y | z>", ""):
        assert tokens.encode(text) == tokens.encode_markup(text)
    assert all(len(tokens.encode(tag)) == 1 for tag in TAG_TOKENS)


def test_text_and_markup_side_by_side_read_like_the_whole(tokens: ChatTokens) -> None:
    parts = [
        tokens.encode_markup("<|im_start|>user\n"),
        tokens.encode(" Which? "),
        tokens.encode_markup("<|im_end|>\n"),
    ]
    assert sum(parts, []) == tokens.encode_markup("<|im_start|>user\n Which? <|im_end|>\n")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    with pytest.raises(CheckpointError, match=r"no tokenizer; expected tokenizer\.json or vocab\.json"):
        read_chat_tokens(tmp_path, system_prompt="")
