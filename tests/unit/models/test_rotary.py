"""Rotary angles of three rows of positions against transformers' own, section by section and interleaved."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megalong.models.gpt import PackRotary
from megalong.models.gpt_shape import GptShape

HEAD_DIM, THETA = 128, 1e6


def shape(section: tuple[int, int, int] | None, *, interleaved: bool = False) -> GptShape:
    return GptShape(
        hidden=HEAD_DIM, layers=1, heads=1, kv_heads=1, head_dim=HEAD_DIM, ffn=8, vocab=8, tied=False, rope_theta=THETA,
        rope_scaling=1.0, norm_eps=1e-6, max_positions=64, mrope_section=section, mrope_interleaved=interleaved,
    )  # fmt: skip


def random_positions() -> torch.Tensor:
    return torch.randint(0, 300, (3, 50), generator=torch.Generator().manual_seed(1))


def config_values(**rope: object) -> dict:
    rope = {"rope_type": "default", "rope_theta": THETA, **rope}
    return {"hidden_size": HEAD_DIM, "num_attention_heads": 1, "head_dim": HEAD_DIM, "rope_parameters": rope}


def test_sections_one_after_the_other() -> None:
    """Qwen2.5-VL rotates with cos of row i in section i, the sections repeated in both halves of the head."""
    section = (16, 24, 24)
    positions = random_positions()
    oracle = Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLTextConfig(**config_values(mrope_section=list(section))))
    tables = oracle(torch.zeros(1), positions[:, None])  # [3, 1, T, head_dim] each, or already put together
    got = PackRotary(shape(section))(positions)[:, 0, 0]
    for function, table in zip((torch.cos, torch.sin), tables, strict=True):
        want = table
        if table.ndim == 4:
            parts = table.split([*section, *section], dim=-1)
            want = torch.cat([part[index % 3] for index, part in enumerate(parts)], dim=-1)
        torch.testing.assert_close(function(got), want[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("section", [(24, 20, 20), (22, 21, 21)])
def test_interleaved_sections(section: tuple[int, int, int]) -> None:
    positions = random_positions()
    values = config_values(mrope_section=list(section), mrope_interleaved=True)
    cos, sin = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**values))(torch.zeros(1), positions[:, None])
    got = PackRotary(shape(section, interleaved=True))(positions)[:, 0, 0]
    torch.testing.assert_close(got.cos(), cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(got.sin(), sin[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_equal_rows_are_plain_positions(interleaved: bool) -> None:
    row = torch.arange(2_000_000, 2_000_020)
    plain = PackRotary(shape(None))(row[None])
    three = PackRotary(shape((24, 20, 20), interleaved=interleaved))(row.expand(3, -1))
    assert torch.equal(plain, three)
    assert torch.equal(PackRotary(shape((24, 20, 20), interleaved=interleaved))(row[None]), plain)
