"""Segments travel through megatron-core as a tensor; what the core attention refuses."""

from __future__ import annotations

import pytest
import torch

from megalong.attention.core import PackCoreAttention, encode_mask
from megalong.attention.reference import pack_attention_reference
from megalong.models.gpt import transformer_config
from megalong.models.gpt_shape import GptShape
from megalong.parallel.layout import ContextGroups
from megalong.records import Segment

SEGMENTS = (
    Segment(start=0, length=3, parent=-1),
    Segment(start=3, length=2, parent=0),
    Segment(start=5, length=1, parent=0),
)


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


def core(*, context: ContextGroups = ContextGroups(), **changes: object) -> PackCoreAttention:  # noqa: B008 - frozen
    return PackCoreAttention(config(**changes), 1, None, "self", context=context)


def test_encoding_by_hand() -> None:
    encoded = encode_mask(SEGMENTS, sharded=True)
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [1, 0, 3, -1, 3, 2, 0, 5, 1, 0]


def rows() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 1, heads, 4, requires_grad=True) for heads in (2, 1, 1)]


def test_core_attention_is_the_reference_at_the_default_scale() -> None:
    query, key, value = rows()
    want = pack_attention_reference(query[:, 0], key[:, 0], value[:, 0], SEGMENTS, scale=0.5)
    got = core()(query, key, value, encode_mask(SEGMENTS, sharded=True))
    assert got.shape == (6, 1, 8)
    torch.testing.assert_close(got, want.reshape(6, 1, 8), rtol=1e-6, atol=1e-6)


def test_a_kept_output_is_used_once_and_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As megatron's recomputation calls it: first without gradients, then with them."""
    attend, parts, mask = core(), rows(), encode_mask(SEGMENTS, sharded=True)
    want = torch.autograd.grad(attend(*parts, mask).square().sum(), parts)
    with attend.kept.record():
        with torch.no_grad():
            first = attend(*parts, mask)

        def no_forward(*_: object) -> None:
            raise RuntimeError("the kernels ran again")

        monkeypatch.setattr("megalong.attention.pack._forward", no_forward)
        again = attend(*parts, mask)
        got = torch.autograd.grad(again.square().sum(), parts)
        with pytest.raises(RuntimeError, match="ran again"):
            attend(*parts, mask)
    assert torch.equal(first, again)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def test_outputs_are_kept_only_while_recording() -> None:
    attend, parts, mask = core(), rows(), encode_mask(SEGMENTS, sharded=True)
    with torch.no_grad():
        attend(*parts, mask)
        assert attend.kept.take() is None
        with attend.kept.record():
            attend(*parts, mask)
    assert attend.kept.take() is None  # dropped at the end of the context


def test_key_heads_that_an_all_to_all_cannot_deal_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 key/value heads.*group of 2; set parallel\.cp_a2a"):
        core(context=ContextGroups(size=2, a2a_size=2))


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        core(attention_dropout=0.1)
