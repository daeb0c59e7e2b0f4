"""Cost formulas against values worked out by hand for the 7B shape (h 3584, 28 layers, 28/4 heads, ffn 18944)."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megalong.config import costs
from megalong.config.longvila_shape import projector_params, read_siglip_shape
from megalong.config.model_shape import ModelShape
from megalong.config.shapes import SHIPPED_SHAPES
from megalong.config.tree import Recompute

PROMPT_3600 = 3600 * 257 + 256


def test_llm_parameters_are_qwen2_7b_s(shape: ModelShape) -> None:
    assert costs.layer_matrix_params(shape) == 3584 * 8192 + 3 * 3584 * 18944 == 233_046_016
    assert costs.layer_vector_params(shape) == 4608 + 7168
    assert costs.llm_params(shape) == 7_615_616_512
    assert costs.llm_params(dataclasses.replace(shape, tied=True)) == 7_615_616_512 - 152_064 * 3584


def test_tower_and_projector_parameters_match_the_published_file_sizes(shape: ModelShape) -> None:
    assert 2 * shape.vision.tower_params == pytest.approx(826.7e6, rel=1e-4)
    assert 2 * shape.vision.projector_params == pytest.approx(58.7e6, rel=1e-3)
    small = dataclasses.replace(read_siglip_shape(SHIPPED_SHAPES["longvila"]), llm_hidden=1536)
    assert 2 * projector_params(small) == pytest.approx(18.9e6, rel=2e-3)


def test_projector_3x3() -> None:
    shape = read_siglip_shape(SHIPPED_SHAPES["longvila"])
    c, h = 1152, 3584
    want = 2 * 9 * c + (9 * c * 3 * c + 3 * c) + 2 * 3 * c + (3 * c * h + h) + (h * h + h)
    assert projector_params(dataclasses.replace(shape, downsample=3)) == want


def test_parameters_per_rank(shape: ModelShape) -> None:
    assert costs.llm_params_per_rank(shape, tp=1, pp=1) == costs.llm_params(shape)
    norms = 28 * 2 * 3584 + 3584
    assert costs.llm_params_per_rank(shape, tp=4, pp=1) == (7_615_616_512 - norms) // 4 + norms
    layers, table = 14 * (233_046_016 + 4608 + 7168), 152_064 * 3584
    assert costs.llm_params_per_rank(shape, tp=1, pp=2) == layers + table
    assert costs.llm_params_per_rank(shape, tp=1, pp=2, stage=1) == layers + table + 3584
    assert [costs.llm_params_per_rank(shape, tp=1, pp=4, stage=stage) for stage in range(4)] == [
        layers // 2 + table, layers // 2, layers // 2, layers // 2 + table + 3584,
    ]  # fmt: skip
    tied = dataclasses.replace(shape, tied=True)
    assert costs.llm_params_per_rank(tied, tp=1, pp=1) == costs.llm_params(tied) == costs.llm_params(shape) - table
    assert costs.llm_params_per_rank(tied, tp=1, pp=2, stage=1) == layers + table + 3584


@pytest.mark.parametrize(
    ("params", "shards", "largest", "want"),
    [(1000, 1, 400, 1000), (1000, 2, 400, 500), (1000, 4, 400, 400), (1001, 2, 10, 501)],
)
def test_optimizer_share_is_even_but_never_less_than_the_largest_parameter(
    params: int, shards: int, largest: int, want: int
) -> None:
    assert costs.optimizer_params_per_rank(params, shards=shards, largest=largest) == want


def visible_pairs(prompt: int, response: int, group: int) -> int:
    """Count, one by one, the keys each query of a pack sees."""
    owner = [0] * prompt + [1 + i for i, _ in itertools.product(range(group), range(response))]
    return sum(owner[k] in (0, owner[q]) for q in range(len(owner)) for k in range(q + 1))


@pytest.mark.parametrize(("prompt", "response", "group"), [(5, 3, 2), (7, 1, 4), (1, 4, 3)])
def test_pairs_equal_a_brute_force_count(prompt: int, response: int, group: int) -> None:
    assert costs.shared_pairs(prompt, response, group) == visible_pairs(prompt, response, group)
    assert costs.repeated_pairs(prompt, response, group) == group * visible_pairs(prompt + response, 0, 1)


@pytest.mark.parametrize(("prompt", "response", "group"), [(5, 3, 2), (7, 1, 4), (1, 4, 3)])
def test_the_last_layer_has_the_queries_that_predict(prompt: int, response: int, group: int) -> None:
    """One by one: the prompt's last token sees the prompt, a response's token what is before it and itself."""
    seen = [prompt] + [prompt + own for _ in range(group) for own in range(1, response)]
    shared = costs.shared_work(prompt, response, group)
    assert (shared.last_tokens, shared.last_pairs) == (len(seen), sum(seen))
    alone = [prompt + own for own in range(response)]
    repeated = costs.repeated_work(prompt, response, group)
    assert (repeated.last_tokens, repeated.last_pairs) == (group * len(alone), group * sum(alone))
    assert costs.shared_work(prompt, response, 1) == costs.repeated_work(prompt, response, 1)


@pytest.mark.parametrize(("video", "text", "response", "group", "questions"), [(5, 2, 3, 2, 4), (3, 1, 1, 3, 2)])
def test_questions_that_share_a_video_have_its_rows_and_pairs_once(
    video: int, text: int, response: int, group: int, questions: int
) -> None:
    below = sum(seen for seen in range(video + 1, video + text + 1)) + group * sum(
        video + text + own for own in range(1, response + 1)
    )
    one, saved = costs.shared_work(video + text, response, group), costs.video_work(video)
    assert questions * one.tokens - (questions - 1) * saved.tokens == video + questions * (text + group * response)
    pairs = questions * one.pairs - (questions - 1) * saved.pairs
    assert pairs == sum(range(1, video + 1)) + questions * below
    assert (saved.last_tokens, saved.last_pairs, saved.rows) == (0, 0, 0)


def test_tokens_of_a_3600_frame_group() -> None:
    assert PROMPT_3600 == 925_456
    assert costs.shared_tokens(PROMPT_3600, 1024, 8) == 933_648
    assert costs.repeated_tokens(PROMPT_3600, 1024, 8) == 7_411_840


def test_flops_constants(shape: ModelShape) -> None:
    assert costs.linear_flops(shape, costs.whole_work(tokens=1, pairs=0, rows=0)) == 2 * 6_525_288_448
    assert costs.attention_flops(shape, costs.whole_work(tokens=0, pairs=1, rows=0)) == 401_408
    keys = costs.Work(tokens=1, pairs=1, last_tokens=0, last_pairs=0, rows=0)
    assert costs.linear_flops(shape, keys) == 2 * (27 * 233_046_016 + 2 * 3584 * 512)
    assert costs.attention_flops(shape, keys) == 401_408 * 27 // 28
    assert costs.head_flops(shape, 1) == 2 * 152_064 * 3584
    assert shape.vision.frame_flops == pytest.approx(0.953e12, rel=1e-3)


def test_flops_of_a_512_frame_group(shape: ModelShape) -> None:
    size = {"prompt": 512 * 257 + 256, "response": 1024, "group": 8}
    shared, repeated = costs.shared_work(**size), costs.repeated_work(**size)
    whole, apart = (
        costs.whole_work(tokens=work.tokens, pairs=work.pairs, rows=work.rows) for work in (shared, repeated)
    )
    assert costs.forward_flops(shape, whole) == pytest.approx(5.76e15, rel=2e-3)
    assert costs.forward_flops(shape, apart) == pytest.approx(42.2e15, rel=2e-3)
    # linear 1.8275 PF, attention 3.9238 PF, head 0.0089 PF forward: 3 x, 3.5 x and 4 x of them.
    assert costs.train_flops(shape, whole, recompute=Recompute.none) == pytest.approx(19.251e15, rel=1e-4)
    assert costs.train_flops(shape, whole, recompute=Recompute.full) == pytest.approx(25.0e15, rel=1e-3)
    # The last layer: 7.33 % of its linear 0.06527 PF (keys and values of all, 8,185 rows of 140,032), and 11.08 % of
    # its attention's 0.14014 PF (1.083e9 of 9.775e9 pairs).
    assert costs.train_flops(shape, shared, recompute=Recompute.none) == pytest.approx(18.634e15, rel=1e-4)
    again = costs.train_flops(shape, shared, recompute=Recompute.full) - costs.train_flops(
        shape, shared, recompute=Recompute.none
    )
    assert again == costs.linear_flops(shape, shared) + costs.attention_flops(shape, shared)


def test_prefill_of_3600_frames_takes_236_s_at_780_tflops(shape: ModelShape) -> None:
    pairs = PROMPT_3600 * (PROMPT_3600 + 1) // 2
    flops = costs.forward_flops(shape, costs.whole_work(tokens=PROMPT_3600, pairs=pairs, rows=1))
    assert flops / 780e12 == pytest.approx(236, abs=0.5)


def test_prefill_and_decode_together_are_one_shared_forward(shape: ModelShape) -> None:
    size = {"prompt": 1000, "response": 30, "group": 4}
    prefill = costs.forward_flops(shape, costs.whole_work(tokens=1000, pairs=1000 * 1001 // 2, rows=0))
    one_pass = costs.forward_flops(
        shape, costs.whole_work(tokens=costs.shared_tokens(**size), pairs=costs.shared_pairs(**size), rows=120)
    )
    assert prefill + costs.decode_flops(shape, **size) == one_pass


def test_key_value_bytes(shape: ModelShape) -> None:
    assert costs.kv_bytes_per_token(shape, element=2) == 57_344


def test_kept_bytes(shape: ModelShape) -> None:
    def kept(*, tp: int, sp: bool, recompute: Recompute) -> int:
        return costs.kept_bytes_per_token(shape, element=2, tp=tp, sequence_parallel=sp, recompute=recompute)

    assert kept(tp=1, sp=False, recompute=Recompute.full) == 7168  # 0.20 MB over 28 layers
    assert kept(tp=4, sp=False, recompute=Recompute.full) == 7168
    assert kept(tp=4, sp=True, recompute=Recompute.full) == 1792
    assert kept(tp=1, sp=False, recompute=Recompute.keep_attention) == 2 * 7168 + 4 * 28  # and 0.20 MB more
    assert kept(tp=4, sp=True, recompute=Recompute.keep_attention) == (2 * 7168 + 4 * 28) // 4
    split = 2 * (3 * 3584 + 4 * 512 + 3 * 18944) + 4 * 28
    assert kept(tp=1, sp=False, recompute=Recompute.none) == 28_672 + split == 168_048
    assert kept(tp=4, sp=False, recompute=Recompute.none) == 28_672 + split // 4
    assert kept(tp=4, sp=True, recompute=Recompute.none) == 168_048 // 4
    sliced = costs.kept_bytes_per_token(
        shape, element=2, tp=1, sequence_parallel=False, recompute=Recompute.none, sliced_mlp=True
    )
    assert sliced == 168_048 - 2 * (3584 + 3 * 18_944)


def test_live_bytes_are_22h_plus_6144_and_12_ffn_in_the_mlp(shape: ModelShape) -> None:
    alone = costs.live_bytes_per_token(shape, element=2, tp=1, sequence_parallel=False)
    assert alone == 22 * 3584 + 6144 == 84_992
    gathered = 2 * 2 * 3584
    assert costs.live_bytes_per_token(shape, element=2, tp=4, sequence_parallel=True) == 84_992 // 4 + gathered
    whole_width = 2 * 6 * 3584
    without = costs.live_bytes_per_token(shape, element=2, tp=4, sequence_parallel=False)
    assert without == whole_width + (84_992 - whole_width) // 4
    assert costs.mlp_bytes_per_row(shape, element=2, tp=1) == 12 * 18_944
    assert costs.mlp_bytes_per_row(shape, element=2, tp=4) == 3 * 18_944


def test_more_ranks_than_key_value_heads_gather_q_k_v(shape: ModelShape) -> None:
    few = dataclasses.replace(shape, kv_heads=1)
    sizes = {"element": 2, "tp": 4, "sequence_parallel": True}
    qkv = 3584 + 2 * 128
    split = 2 * (3 * 3584 + 4 * 4 * 128 + 3 * 18944) + 4 * 28  # every rank has a key-value head
    kept = costs.kept_bytes_per_token(few, recompute=Recompute.none, **sizes)
    assert kept == 2 * 3584 + 2 * qkv + split // 4
    # At four heads on four ranks nothing is gathered, and a rank's share of k and v is the same.
    assert costs.live_bytes_per_token(few, **sizes) == costs.live_bytes_per_token(shape, **sizes) + 4 * qkv


def test_logits_are_bounded_by_the_chunk(shape: ModelShape) -> None:
    rows = costs.CHUNK_LOGITS // (152_064 // 4)
    assert rows == 1765
    assert costs.logits_bytes(shape, tp=4, rows=10**6, train=False) == 12 * rows * 38_016
    assert costs.logits_bytes(shape, tp=4, rows=10, train=False) == 12 * 10 * 38_016
    assert costs.logits_bytes(shape, tp=4, rows=10, train=True) == 12 * 10 * 38_016 + 4 * 38_016 * 3584


def test_activations_of_a_frame(shape: ModelShape) -> None:
    assert shape.vision.frame_elements == 1024 * (8 * 1152 + 2 * 4304)


def test_norms_of_queries_and_keys_and_no_biases(shape: ModelShape) -> None:
    other = dataclasses.replace(shape, qkv_bias=False, qk_norm=True)
    assert costs.layer_vector_params(other) == 2 * 3584 + 2 * 128
    norms = 28 * (2 * 3584 + 2 * 128) + 3584
    assert costs.llm_params_per_rank(other, tp=4, pp=1) == (costs.llm_params(other) - norms) // 4 + norms


def test_slices_of_an_mlp() -> None:
    def slices(rows: int, *, chunks: int = 0, recompute: bool = True) -> int:
        return costs.mlp_slices(rows, chunks=chunks, recompute=recompute)

    assert [slices(rows) for rows in (1, 16_384, 16_385, 933_648)] == [1, 1, 2, 57]
    assert slices(933_648, recompute=False) == 1  # nothing is computed again
    assert slices(933_648, chunks=1) == 1
    assert slices(933_648, chunks=4, recompute=False) == slices(10, chunks=4) == 4
