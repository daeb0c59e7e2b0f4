"""Spans travel through megatron-core as a tensor; what the core attention refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalong.attention.core import PackCoreAttention, decode_spans, encode_spans
from megalong.attention.reference import pack_attention_reference
from megalong.models.gpt import transformer_config
from megalong.models.gpt_shape import GptShape
from megalong.records import GroupSpan

spans_strategy = st.lists(
    st.builds(
        GroupSpan,
        start=st.integers(0, 3_000_000),
        prefix_len=st.integers(0, 3_000_000),
        response_lens=st.lists(st.integers(1, 40_000), max_size=16).map(tuple),
    ),
    max_size=6,
).map(tuple)


def config(**changes: object) -> object:
    shape = GptShape(
        hidden=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=8, vocab=16, tied=False, rope_theta=1e4,
        rope_scaling=1.0, norm_eps=1e-6, max_positions=64,
    )  # fmt: skip
    built = transformer_config(
        shape, tp=1, cp=1, pp=1, sequence_parallel=False, dtype=torch.float32, recompute=False, on_gpu=False
    )
    for name, value in changes.items():
        setattr(built, name, value)
    return built


@given(spans_strategy)
def test_encode_decode_round_trip(spans: tuple[GroupSpan, ...]) -> None:
    encoded = encode_spans(spans)
    assert encoded.dtype == torch.int64
    assert tuple(decode_spans(encoded)) == spans


def test_encoding_by_hand() -> None:
    spans = (
        GroupSpan(start=0, prefix_len=7, response_lens=(2, 3)),
        GroupSpan(start=12, prefix_len=4, response_lens=()),
    )
    assert encode_spans(spans).tolist() == [0, 7, 2, 2, 3, 12, 4, 0]


def test_core_attention_is_the_reference_at_the_default_scale() -> None:
    spans = (GroupSpan(start=0, prefix_len=3, response_lens=(2, 1)),)
    torch.manual_seed(0)
    query, key, value = torch.randn(6, 1, 2, 4), torch.randn(6, 1, 1, 4), torch.randn(6, 1, 1, 4)
    attend = PackCoreAttention(config(), 1, None, "self")
    want = pack_attention_reference(query[:, 0], key[:, 0], value[:, 0], list(spans), scale=0.5)
    got = attend(query, key, value, encode_spans(spans))
    assert got.shape == (6, 1, 8)
    torch.testing.assert_close(got, want.reshape(6, 1, 8), rtol=1e-6, atol=1e-6)


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.cp=2.*set parallel\.cp=1"):
        PackCoreAttention(config(context_parallel_size=2), 1, None, "self")


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        PackCoreAttention(config(attention_dropout=0.1), 1, None, "self")
