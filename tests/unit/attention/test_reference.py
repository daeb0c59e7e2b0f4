"""A pack of groups gives what separate [prefix | response] sequences give (design contract 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalong.attention.reference import pack_attention_reference, response_mask
from megalong.attention.shared_prefix import pack_attention
from megalong.records import GroupSpan

HEAD_DIM = 6


def make_spans(groups: list[tuple[int, tuple[int, ...]]]) -> list[GroupSpan]:
    spans, start = [], 0
    for prefix_len, response_lens in groups:
        spans.append(GroupSpan(start=start, prefix_len=prefix_len, response_lens=response_lens))
        start += spans[-1].length
    return spans


def plain_causal(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Written out attention of one sequence: query [L, Q, d], key and value [L, K, d]; heads share keys in order."""
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads_per_key, dim=1) for tensor in (key, value))
    scores_QLL = torch.einsum("iqd,jqd->qij", query, key) * scale
    length = len(query)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("qij,jqd->iqd", scores_QLL.masked_fill(future, -math.inf).softmax(-1), value)


def separate_sequences(query: Tensor, key: Tensor, value: Tensor, spans: list[GroupSpan], *, scale: float) -> Tensor:
    """Each [prefix | response i] alone; the prefix rows are kept from the first (they are the same in all)."""
    outputs = []
    for span in spans:
        prefix = list(range(span.start, span.start + span.prefix_len))
        at, of_group = span.start + span.prefix_len, []
        for length in span.response_lens or (0,):
            rows = prefix + list(range(at, at + length))
            out = plain_causal(query[rows], key[rows], value[rows], scale=scale)
            of_group.append(out if not of_group else out[span.prefix_len :])
            at += length
        outputs += of_group
    return torch.cat(outputs)


ATTENDS: dict[str, Callable[..., Tensor]] = {
    "reference": pack_attention_reference,
    "three plain calls": partial(pack_attention, kernel="plain"),
    "three calls of the CPU kernel": partial(pack_attention, kernel="cpu_flash"),
}


def assert_equal_to_separate(
    attend: Callable[..., Tensor],
    groups: list[tuple[int, tuple[int, ...]]],
    *,
    heads: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    spans = make_spans(groups)
    length = sum(span.length for span in spans)
    generator = torch.Generator().manual_seed(length)
    leaves = [
        torch.randn(length, count, HEAD_DIM, dtype=dtype, generator=generator).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]
    upstream = torch.randn(length, heads[0], HEAD_DIM, dtype=dtype, generator=generator)
    results = []
    for compute in (attend, separate_sequences):
        out = compute(*leaves, spans, scale=0.37)
        results.append((out, *torch.autograd.grad((out * upstream).sum(), leaves)))
    for name, got, want in zip(("output", "d query", "d key", "d value"), *results, strict=True):
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name} of {groups}: {text}"
        )


CASES = {
    "one plain sequence": [(5, (4,))],
    "ragged, with a response of one token": [(5, (3, 1, 4))],
    "responses longer than the prefix": [(2, (7, 5))],
    "a prefix of one token": [(1, (3, 2))],
    "several groups": [(4, (2, 3)), (1, (5,)), (6, (1, 1, 1))],
    "padding behind the groups": [(4, (2, 3)), (3, ())],
}


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS.keys())
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=lambda pair: f"{pair[0]}q{pair[1]}kv")
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES.keys())
def test_pack_equals_separate_sequences_in_float64(
    groups: list[tuple[int, tuple[int, ...]]], heads: tuple[int, int], attend: Callable[..., Tensor]
) -> None:
    assert_equal_to_separate(attend, groups, heads=heads, dtype=torch.float64, tolerance=1e-12)


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS.keys())
def test_pack_equals_separate_sequences_in_float32(attend: Callable[..., Tensor]) -> None:
    groups = CASES["several groups"]
    assert_equal_to_separate(attend, groups, heads=(4, 2), dtype=torch.float32, tolerance=1e-5)


group = st.tuples(st.integers(1, 9), st.lists(st.integers(1, 8), max_size=4).map(tuple))


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS.keys())
@settings(max_examples=40, deadline=None)
@given(groups=st.lists(group, min_size=1, max_size=4))
def test_any_lengths(groups: list[tuple[int, tuple[int, ...]]], attend: Callable[..., Tensor]) -> None:
    assert_equal_to_separate(attend, groups, heads=(2, 1), dtype=torch.float64, tolerance=1e-12)


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS.keys())
def test_scores_of_hundreds_stay_exact(attend: Callable[..., Tensor]) -> None:
    """Log-sum-exps that differ by hundreds are merged without overflow."""
    spans = make_spans([(3, (2, 2))])
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(7, 2, HEAD_DIM, dtype=torch.float64, generator=generator) for _ in range(3))
    key[:3] *= 500
    want = separate_sequences(query, key, value, spans, scale=1.0)
    torch.testing.assert_close(attend(query, key, value, spans, scale=1.0), want, rtol=1e-12, atol=1e-12)


def test_response_sees_its_prefix_and_its_own_past_only() -> None:
    span = GroupSpan(start=9, prefix_len=2, response_lens=(1, 3))
    mask = response_mask(span, device=torch.device("cpu"))
    assert mask.int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 1, 1, 1],
    ]


def test_a_kernel_that_does_not_take_the_input_names_the_setting() -> None:
    rows = [torch.zeros(3, 1, HEAD_DIM)] * 3
    with pytest.raises(ValueError, match=r"model\.attention=flash runs on cuda.*set model\.attention=auto"):
        pack_attention(*rows, make_spans([(2, (1,))]), scale=1.0, kernel="flash")
