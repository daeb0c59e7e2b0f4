"""Segments travel through megatron-core as a tensor; what the core attention refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalong.attention.core import PackCoreAttention, encode_mask
from megalong.attention.kernels import KERNELS
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


NEEDED = torch.tensor([2, 3])
"""The prefix's last row and the longer response's first: both responses' predictions."""


def mask_of() -> torch.Tensor:
    return encode_mask(SEGMENTS, sharded=True, needed_U=NEEDED, multiple=3)


def test_encoding_by_hand() -> None:
    encoded = mask_of()
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [1, 3, 1, 2, 4, 0, 3, -1, 3, 2, 0, 5, 1, 0]
    apart = encode_mask(SEGMENTS, sharded=False, needed_U=torch.tensor([0, 2, 3, 5]), multiple=1)
    assert apart.tolist()[:9] == [0, 1, 3, 0, 1, 2, 4, 5, 6]
    assert encode_mask(SEGMENTS, sharded=False, needed_U=NEEDED[:0], multiple=1).tolist()[:4] == [0, 1, 0, 0]


def rows() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 1, heads, 4, requires_grad=True) for heads in (2, 1, 1)]


def test_core_attention_is_the_reference_at_the_default_scale() -> None:
    query, key, value = rows()
    want = pack_attention_reference(query[:, 0], key[:, 0], value[:, 0], SEGMENTS, scale=0.5)
    got = core()(query, key, value, mask_of())
    assert got.shape == (6, 1, 8)
    torch.testing.assert_close(got, want.reshape(6, 1, 8), rtol=1e-6, atol=1e-6)


def test_the_last_layer_s_has_the_rows_that_predict_and_padding() -> None:
    parts, attend = rows(), core()
    whole = attend(*parts, mask_of())
    attend.needed_only = True
    got = attend(*parts, mask_of())
    assert got.shape == (3, 1, 8)  # two rows and one that makes three of them
    torch.testing.assert_close(got[:2], whole[NEEDED], rtol=1e-6, atol=1e-6)
    assert not got[2].any()
    grads = [torch.autograd.grad(out.sin().sum(), parts) for out in (got, whole[NEEDED])]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_kernel_that_merges_no_calls_has_its_outputs_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    lone, parts = (Segment(start=0, length=6, parent=-1),), rows()
    mask = encode_mask(lone, sharded=False, needed_U=torch.tensor([3, 4]), multiple=1)
    want = core()(*parts, mask)[3:5]
    monkeypatch.setitem(KERNELS, "plain", replace(KERNELS["plain"], merges=False))
    attend = PackCoreAttention(config(), 1, None, "self", context=ContextGroups(), kernel="plain")
    attend.needed_only = True
    got = attend(*parts, mask)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(out.sin().sum(), parts) for out in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_kept_output_is_used_once_and_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As megatron's recomputation calls it: first without gradients, then with them."""
    attend, parts, mask = core(), rows(), mask_of()
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
    attend, parts, mask = core(), rows(), mask_of()
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
