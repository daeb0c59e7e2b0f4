"""Losses, gradients, weights and rollouts do not depend on how a run is split over processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import DemoWorld, run_world
from recorded_runs import EXACT, VARIANTS, Recorded, assert_equal_runs, is_tower_key_bias, record_all

LAYOUTS = {
    "tp2": (2, ("parallel.tp=2",)),
    "tp2_sp": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "dp2": (2, ()),
    "tp2_dp2": (4, ("parallel.tp=2",)),
    "pp2": (2, ("parallel.pp=2",)),
    "tp2_pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
    "pp2_dp2": (4, ("parallel.pp=2",)),
    # Rows for heads, attention outputs kept over the recomputation of the layers, and MLPs in slices.
    "cp2": (2, ("parallel.cp=2", "model.recompute=keep_attention", "model.mlp_chunks=3")),
    "cp2_ring": (2, ("parallel.cp=2", "parallel.cp_a2a=1")),
    "cp4": (4, ("parallel.cp=4",)),  # two rings of two
    "tp2_cp2_sp": (4, ("parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true")),
    "cp2_pp2": (4, ("parallel.cp=2", "parallel.pp=2")),
    "tp2_none": (2, ("parallel.tp=2", "mr_sp.mode=none")),
    "cp2_none": (2, ("parallel.cp=2", "mr_sp.mode=none")),
    "cp2_stage1": (2, ("parallel.cp=2", "mr_sp.mode=stage1")),
    "cp2_stage1+2": (2, ("parallel.cp=2", "mr_sp.mode=stage1+2")),
    # Two key-value heads: each is shared by two ranks.
    "tp4_sp": (4, ("parallel.tp=4", "parallel.sequence_parallel=true")),
}
"""Name -> number of processes and overrides."""
IN_FLOAT32 = ("tp2", "tp2_sp", "dp2", "tp2_dp2", "pp2", "cp2", "cp2_none", "cp2_stage1", "cp2_stage1+2")
"""Layouts that run every variant; the others run those in float64, where the bound is 1e-10."""
IN_PAIRS = ("tp2_sp", "dp2", "pp2", "cp2_ring", "tp2_cp2_sp")
"""Layouts that run the questions about one video."""


def exact_variants(layout: str) -> list[str]:
    return [name for name in EXACT if not name.startswith("pairs") or (layout in IN_PAIRS and "apart" not in name)]


def variants_of(layout: str) -> list[str]:
    return [*(VARIANTS if layout in IN_FLOAT32 else ()), *exact_variants(layout)]


REPEATING = {"tp2_none", "cp2_none", "cp2_stage1", "cp2_stage1+2"}
"""Every response goes through the model behind a prompt of its own: more tokens, the same result."""
REFERENCE_OF = {"sft_split": "sft", "grpo_split": "grpo"}
"""Variants that must equal another one: they only cut the batch differently."""

Ranks = list[dict[str, Recorded]]


@pytest.fixture(scope="module")
def alone(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorded]:
    """Every variant in one process: what all layouts are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    return run_world(1, record_all, demo, folder, (), {}, [*VARIANTS, *EXACT], folder=folder)[0]


@pytest.fixture(scope="module")
def split(
    demo: DemoWorld, alone: dict[str, Recorded], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Ranks]:
    """Every variant under a layout, by rank; each layout is run once. GRPO trains on the rollouts of one process."""
    done: dict[str, Ranks] = {}
    rollouts = {name: reference(alone, name).sampled for name in alone}

    def under(layout: str) -> Ranks:
        if layout not in done:
            size, overrides = LAYOUTS[layout]
            folder = tmp_path_factory.mktemp(layout)
            done[layout] = run_world(
                size, record_all, demo, folder, overrides, rollouts, variants_of(layout), folder=folder
            )
        return done[layout]

    return under


def reference(alone: dict[str, Recorded], variant: str) -> Recorded:
    return alone[REFERENCE_OF.get(variant, variant)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", IN_FLOAT32)
def test_a_layout_trains_like_one_process(
    layout: str, variant: str, alone: dict[str, Recorded], split: Callable[[str], Ranks]
) -> None:
    for recorded in split(layout):
        assert_equal_runs(recorded[variant], reference(alone, variant), same_tokens=layout not in REPEATING)


@pytest.mark.parametrize(
    ("layout", "variant"), [(name, variant) for name in LAYOUTS for variant in exact_variants(name)]
)
def test_a_layout_in_float64_differs_by_no_more_than_its_rounding(
    layout: str, variant: str, alone: dict[str, Recorded], split: Callable[[str], Ranks]
) -> None:
    for recorded in split(layout):
        assert next(iter(recorded[variant].gradients.values())).dtype == torch.float64
        assert_equal_runs(recorded[variant], alone[variant], exact=True, same_tokens=layout not in REPEATING)


@pytest.mark.parametrize("variant", REFERENCE_OF)
def test_one_process_trains_alike_for_any_micro_batches(variant: str, alone: dict[str, Recorded]) -> None:
    assert_equal_runs(alone[variant], reference(alone, variant))
    assert alone[variant].stats[0].num_tokens > 0


def test_questions_about_one_video_share_it_and_train_as_if_they_did_not(alone: dict[str, Recorded]) -> None:
    together, apart = alone["pairs_float64"], alone["pairs_apart_float64"]
    assert_equal_runs(together, apart, exact=True, same_tokens=False)
    for step, groups in enumerate(together.sampled):
        prompts = [group.group.prompt for group in groups]
        assert len({prompt.selections for prompt in prompts}) == len(prompts) / 2
        videos = sum(len(prompt.ids_P) for prompt in prompts[::2])
        assert together.stats[step].num_tokens < apart.stats[step].num_tokens - 0.5 * videos


def test_what_is_compared_moves(alone: dict[str, Recorded]) -> None:
    """Equality proves nothing about gradients that are zero or weights that stay where they are."""
    for name, recorded in alone.items():
        trained = {
            key
            for key, gradient in recorded.gradients.items()
            if float(gradient.abs().max()) > 1e-7 and not torch.equal(gradient, recorded.weights[key])
        }
        vision = {key for key in recorded.weights if not key.startswith("llm/") and not is_tower_key_bias(key)}
        language = {key for key in recorded.weights if key.startswith("llm/")}
        frozen = ("grpo", "grpo_split", "grpo_one_update", "pairs", "pairs_apart")
        only = {"sft_vision_only": vision, **dict.fromkeys(frozen, language)}
        expected = only.get(name.removesuffix("_float64"), language | vision)
        assert expected <= trained
        assert all(0 < stats.grad_norm < 100 for stats in recorded.stats)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_samples_the_rollouts_of_one_process(
    layout: str, alone: dict[str, Recorded], split: Callable[[str], Ranks]
) -> None:
    expected = alone["grpo_float64"].sampled
    for recorded in split(layout):
        for step, (ours, theirs) in enumerate(zip(recorded["grpo_float64"].sampled, expected, strict=True)):
            ids = [(group.group.prompt.sample.sample_id, group.group.response_ids) for group in ours]
            assert ids == [(group.group.prompt.sample.sample_id, group.group.response_ids) for group in theirs], step
    lengths = {len(response) for group in expected[0] for response in group.group.response_ids}
    assert len(lengths) > 3


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"tp2_none", "cp2_none"}))
def test_frames_are_shared_out_over_a_replica(
    layout: str, alone: dict[str, Recorded], split: Callable[[str], Ranks]
) -> None:
    """Every frame is encoded by exactly one rank of a replica, five frames over two ranks included."""
    ranks = split(layout)
    for variant in ("sft_float64", "sft_one_frame_float64"):
        counts = [recorded[variant].frames_encoded for recorded in ranks]
        assert sum(counts) == alone[variant].frames_encoded > 0
    if layout.startswith("tp2"):
        shares = [recorded["sft_float64"].frames_encoded for recorded in ranks]
        assert max(shares) < alone["sft_float64"].frames_encoded


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp", "tp2_pp2", "cp2", "tp2_cp2_sp", "tp4_sp"])
def test_no_embedding_is_on_two_ranks_that_have_rows_of_their_own(
    layout: str, alone: dict[str, Recorded], split: Callable[[str], Ranks]
) -> None:
    """Context and sequence parallelism cut the rows; without the latter every tensor-parallel rank has them all."""
    ranks, copies = split(layout), 2 if layout in ("tp2", "tp2_pp2") else 1
    for variant in ("sft_float64", "sft_tied_float64"):
        whole = alone[variant].embeddings
        assert min(whole) > 0
        assert [sum(rows) for rows in zip(*(recorded[variant].embeddings for recorded in ranks), strict=True)] == [
            copies * count for count in whole
        ]
        if copies == 1:
            assert all(max(recorded[variant].embeddings) < max(whole) for recorded in ranks)
