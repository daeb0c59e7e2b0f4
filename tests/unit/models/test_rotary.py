"""Rotary angles of one row of positions and of three, section by section and interleaved.

Against transformers' own, and, where its float32 angles are off by up to 0.1 rad, against float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megalong.models.gpt import PackRotary
from megalong.models.gpt_shape import GptShape

HEAD_DIM, THETA = 128, 1e6
LAST = 8192 * 257 + 256
"""Position behind 8,192 frames of 256 tokens and a newline, and 256 more tokens."""


def shape(
    section: tuple[int, int, int] | None, *, interleaved: bool = False, theta: float = THETA, scaling: float = 1.0
) -> GptShape:
    return GptShape(
        hidden=HEAD_DIM, layers=1, heads=1, kv_heads=1, head_dim=HEAD_DIM, ffn=8, vocab=8, tied=False, rope_theta=theta,
        rope_scaling=scaling, norm_eps=1e-6, max_positions=64, mrope_section=section, mrope_interleaved=interleaved,
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
    row = torch.arange(LAST - 20, LAST + 1)
    plain = PackRotary(shape(None))(row[None])
    three = PackRotary(shape((24, 20, 20), interleaved=interleaved))(row.expand(3, -1))
    assert torch.equal(plain, three)
    assert torch.equal(PackRotary(shape((24, 20, 20), interleaved=interleaved))(row[None]), plain)


@pytest.mark.parametrize(
    ("of", "axis"),
    [
        (shape(None, theta=1_062_356_830.0, scaling=4.0), lambda place: 0),
        (shape((16, 24, 24)), lambda place: (place >= 16) + (place >= 40)),
        (shape((24, 20, 20), interleaved=True), lambda place: place % 3 if place < 60 else 0),
    ],
    ids=["1-D", "sections", "interleaved"],
)
def test_angles_are_exact_to_the_last_position(of: GptShape, axis: Callable[[int], int]) -> None:
    """Their rounding to float32 is all that differs from float64: half a unit in the last place below 2 pi."""
    some_P = torch.cat((torch.arange(0, LAST, 1013), torch.arange(LAST - 300, LAST + 1)))
    rows = torch.stack((some_P, LAST - some_P, some_P // 2 + 7))
    got = PackRotary(of)(rows if of.mrope_section else rows[:1])[:, 0, 0]
    assert got.dtype == torch.float32
    for place in range(HEAD_DIM // 2):
        want_P = rows[axis(place)].numpy() / of.rope_scaling / of.rope_theta ** (2 * place / HEAD_DIM)
        for half in (place, place + HEAD_DIM // 2):
            turned_P = got[:, half].numpy().astype(np.float64)
            assert np.abs(np.exp(1j * turned_P) - np.exp(1j * want_P)).max() < 2**-22 + 1e-8
