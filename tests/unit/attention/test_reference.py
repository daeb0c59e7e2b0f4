"""A pack gives what separate root-to-leaf sequences give: any tree, any cut over a ring."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalong.attention import pack
from megalong.attention.last_layer import row_spans
from megalong.attention.pack import pack_attention
from megalong.attention.reference import pack_attention_reference, visible
from megalong.attention.tree import encode_segments, plan_calls, plan_rows
from megalong.records import Segment

HEAD_DIM = 6
Tree = tuple[int, tuple["Tree", ...]]
"""(rows, children)."""


def make_segments(forest: tuple[Tree, ...]) -> list[Segment]:
    segments: list[Segment] = []

    def add(tree: Tree, parent: int) -> None:
        start = segments[-1].stop if segments else 0
        segments.append(Segment(start=start, length=tree[0], parent=parent))
        me = len(segments) - 1
        for child in tree[1]:
            add(child, me)

    for tree in forest:
        add(tree, -1)
    return segments


def group(prefix: int, *responses: int) -> Tree:
    return (prefix, tuple((length, ()) for length in responses))


def plain_causal(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Written out attention of one sequence: query [L, Q, d], key and value [L, K, d]; heads share keys in order."""
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads_per_key, dim=1) for tensor in (key, value))
    scores_QLL = torch.einsum("iqd,jqd->qij", query, key) * scale
    length = len(query)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("qij,jqd->iqd", scores_QLL.masked_fill(future, -math.inf).softmax(-1), value)


def separate_sequences(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], *, scale: float) -> Tensor:
    """Each segment at the end of the sequence of its ancestors, one sequence per segment."""
    outputs = []
    for segment in segments:
        path, rows = segment, list(range(segment.start, segment.stop))
        while path.parent >= 0:
            path = segments[path.parent]
            rows = [*range(path.start, path.stop), *rows]
        outputs.append(plain_causal(query[rows], key[rows], value[rows], scale=scale)[-segment.length :])
    return torch.cat(outputs)


def ring_of(size: int, kernel: str) -> Callable[..., Tensor]:
    """The planned form, the ranks of a ring in turn: each has its rows of the queries and all keys."""

    def attend(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], *, scale: float) -> Tensor:
        heads_first = [part.transpose(0, 1)[None] for part in (query, key, value)]
        out = torch.full_like(query, torch.nan)
        for rank in range(size):
            plan = plan_calls(tuple(encode_segments(segments)), ring_rank=rank, ring_size=size)
            rows = torch.tensor([row for first, last in plan.rows for row in range(first, last)], dtype=torch.int64)
            padded = torch.cat((rows, rows.new_zeros(2)))  # two padding rows behind
            mine = pack_attention(
                heads_first[0].index_select(2, padded), *heads_first[1:], plan, scale=scale, kernel=kernel
            )
            assert not mine[:, :, len(rows) :].any()
            out = out.index_copy(0, rows, mine[0, :, : len(rows)].transpose(0, 1))
        return out

    return attend


ATTENDS: dict[str, Callable[..., Tensor]] = {
    "reference": pack_attention_reference,
    "plain calls": ring_of(1, "plain"),
    "calls of the CPU kernel": ring_of(1, "cpu_flash"),
    "ring of two": ring_of(2, "plain"),
    "ring of three": ring_of(3, "cpu_flash"),
    "ring of four": ring_of(4, "cpu_flash"),
}


def assert_equal_to_separate(
    attend: Callable[..., Tensor], forest: tuple[Tree, ...], *,
    heads: tuple[int, int], dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    segments = make_segments(forest)
    length = segments[-1].stop
    generator = torch.Generator().manual_seed(length)
    leaves = [
        torch.randn(length, count, HEAD_DIM, dtype=dtype, generator=generator).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]
    upstream = torch.randn(length, heads[0], HEAD_DIM, dtype=dtype, generator=generator)
    results = []
    for compute in (attend, separate_sequences):
        out = compute(*leaves, segments, scale=0.37)
        results.append((out, *torch.autograd.grad((out * upstream).sum(), leaves)))
    for name, got, want in zip(("output", "d query", "d key", "d value"), *results, strict=True):
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name} of {forest}: {text}"
        )


BF16_GROUP = group(96, 16, 1, 24, 16)


def bfloat16_errors(segments: list[Segment], *, seed: int) -> tuple[float, float]:
    """Squared errors against float64, summed over the response rows: of the pack, and of sequences of their own."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(segments[-1].stop, count, 32, generator=generator, dtype=torch.bfloat16) for count in (4, 2, 2)
    ]
    attend, scale = ring_of(1, "plain"), 32**-0.5
    exact = separate_sequences(*(part.double() for part in parts), segments, scale=scale)
    prefix, *responses = segments
    ours = (attend(*parts, segments, scale=scale).double() - exact)[prefix.stop :].square().sum()
    theirs = 0.0
    for segment in responses:
        rows = torch.cat((torch.arange(prefix.stop), torch.arange(segment.start, segment.stop)))
        whole = attend(*(part[rows] for part in parts), make_segments(((len(rows), ()),)), scale=scale)
        theirs += (whole.double() - exact[rows])[prefix.stop :].square().sum()
    return float(ours), float(theirs)


@pytest.mark.parametrize("keys_of_a_call", [pack.FINE_KEYS, 40])
@pytest.mark.parametrize(("fine", "limit"), [(torch.float32, 1.01), (torch.float16, 1.05)])
def test_a_pack_in_bfloat16_is_as_close_as_sequences_of_their_own(
    keys_of_a_call: int, fine: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each output is rounded to it once, however many calls it comes from; with bfloat16 calls it would be 2."""
    monkeypatch.setattr(pack, "FINE_KEYS", keys_of_a_call)
    monkeypatch.setitem(pack.FINE, "cpu", fine)
    segments = make_segments((BF16_GROUP,))
    ours, theirs = (
        sum(part) for part in zip(*(bfloat16_errors(segments, seed=seed) for seed in range(8)), strict=True)
    )
    assert ours < limit * theirs


CASES = {
    "one plain sequence": (group(5, 4),),
    "ragged, with a response of one token": (group(5, 3, 1, 4),),
    "responses longer than the prefix": (group(2, 7, 5),),
    "a prefix of one token": (group(1, 3, 2),),
    "several groups": (group(4, 2, 3), group(1, 5), group(6, 1, 1, 1)),
    "a group without responses": (group(4, 2, 3), group(3)),
    "questions about one video": ((9, (group(2, 3, 1), group(1, 4, 2, 2))),),
    "one of the questions has one response": ((5, (group(2, 3), group(1, 4, 2))), group(3, 2, 2)),
    "a tree of depth three": ((3, ((2, (group(2, 1, 3), group(1, 2))), (4, ()))),),
}


@pytest.mark.parametrize("keys_of_a_call", [pack.FINE_KEYS, 3])
@pytest.mark.parametrize("attend", [name for name in ATTENDS if name != "reference"])
@pytest.mark.parametrize("forest", CASES.values(), ids=CASES.keys())
def test_pack_in_bfloat16_differs_by_its_rounding(
    forest: tuple[Tree, ...], attend: str, keys_of_a_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any tree and ring, where calls are of several precisions and the keys of one are cut."""
    monkeypatch.setattr(pack, "FINE_KEYS", keys_of_a_call)
    segments = make_segments(forest)
    generator = torch.Generator().manual_seed(1)
    parts = [
        torch.randn(segments[-1].stop, count, HEAD_DIM, dtype=torch.bfloat16, generator=generator)
        for count in (4, 2, 2)
    ]
    got = ATTENDS[attend](*parts, segments, scale=0.37)
    want = separate_sequences(*(part.double() for part in parts), segments, scale=0.37)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS.keys())
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=lambda pair: f"{pair[0]}q{pair[1]}kv")
@pytest.mark.parametrize("forest", CASES.values(), ids=CASES.keys())
def test_pack_equals_separate_sequences_in_float64(
    forest: tuple[Tree, ...], heads: tuple[int, int], attend: Callable[..., Tensor]
) -> None:
    assert_equal_to_separate(attend, forest, heads=heads, dtype=torch.float64, tolerance=1e-12)


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS.keys())
def test_pack_equals_separate_sequences_in_float32(attend: Callable[..., Tensor]) -> None:
    assert_equal_to_separate(attend, CASES["several groups"], heads=(4, 2), dtype=torch.float32, tolerance=1e-5)


leaf = st.tuples(st.integers(1, 8), st.just(()))
trees = st.recursive(leaf, lambda child: st.tuples(st.integers(1, 9), st.lists(child, max_size=4).map(tuple)))


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS.keys())
@settings(max_examples=40, deadline=None)
@given(forest=st.lists(trees, min_size=1, max_size=3).map(tuple))
@example(forest=((1, ()),))
def test_any_tree(forest: tuple[Tree, ...], attend: Callable[..., Tensor]) -> None:
    assert_equal_to_separate(attend, forest, heads=(2, 1), dtype=torch.float64, tolerance=1e-12)


@pytest.mark.parametrize("kernel", ["plain", "cpu_flash"])
@settings(max_examples=60, deadline=None)
@given(forest=st.lists(trees, min_size=1, max_size=3).map(tuple), data=st.data())
@example(forest=(group(5, 3, 1, 4),), data=None)
def test_any_rows_of_any_tree(forest: tuple[Tree, ...], kernel: str, data: st.DataObject | None) -> None:
    """Of some rows alone: their outputs, and the gradients that come from them, keys of other rows included."""
    segments = make_segments(forest)
    length = segments[-1].stop
    picks = [1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0]  # the last of the prefix, all but the last of each response
    if data is not None:
        picks = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    rows = torch.tensor(picks).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(length)
    leaves = [
        torch.randn(length, count, HEAD_DIM, dtype=torch.float64, generator=generator).requires_grad_()
        for count in (4, 2, 2)
    ]
    upstream = torch.randn(len(rows), 4, HEAD_DIM, dtype=torch.float64, generator=generator)
    whole = separate_sequences(*leaves, segments, scale=0.37)[rows]
    plan = plan_rows(tuple(encode_segments(segments)), row_spans(rows))
    query, key, value = (part.transpose(0, 1)[None] for part in leaves)
    padded = torch.cat((query[:, :, rows], query[:, :, :1]), dim=2)  # one padding row behind
    out = pack_attention(padded, key, value, plan, scale=0.37, kernel=kernel)[0].transpose(0, 1)
    assert not out[len(rows) :].any()
    out = out[: len(rows)]
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((whole * upstream).sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad((out * upstream).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS.keys())
def test_scores_of_hundreds_stay_exact(attend: Callable[..., Tensor]) -> None:
    """Log-sum-exps that differ by hundreds are merged without overflow."""
    segments = make_segments((group(3, 2, 2),))
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(7, 2, HEAD_DIM, dtype=torch.float64, generator=generator) for _ in range(3))
    key[:3] *= 500
    want = separate_sequences(query, key, value, segments, scale=1.0)
    torch.testing.assert_close(attend(query, key, value, segments, scale=1.0), want, rtol=1e-12, atol=1e-12)


def test_response_sees_its_prefix_and_its_own_past_only() -> None:
    mask = visible(make_segments((group(2, 1, 3),)), device=torch.device("cpu"))
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 1, 1, 1],
    ]


def test_a_kernel_that_does_not_take_the_input_names_the_setting() -> None:
    plan = plan_calls((0, 2, -1, 2, 1, 0), ring_rank=0, ring_size=1)
    rows = [torch.zeros(1, 1, 3, HEAD_DIM)] * 3
    with pytest.raises(ValueError, match=r"model\.attention=flash runs on cuda.*set model\.attention=auto"):
        pack_attention(*rows, plan, scale=1.0, kernel="flash")
