"""qwen3_vl in Megatron against transformers' Qwen3VLForConditionalGeneration on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_vl
from harness import make_builder
from qwen_vl_oracle import FILM, HOUR, ODD, PACKS, Pack, check_pack, check_stages, check_vocabulary_rows

from megalong.config.tree import Recompute
from megalong.models.families import FAMILIES
from megalong.parallel.layout import ParallelLayout
from megalong.records import MEDIA_TOKEN

FAMILY = "qwen3_vl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vl.write_qwen3_vl(tmp_path_factory.mktemp(FAMILY))


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_logprobs_and_gradients_equal_transformers(folder: Path, layout: ParallelLayout, pack: Pack) -> None:
    check_pack(folder, layout, pack, family=FAMILY)


def test_deepstack_gradients_survive_recomputation(folder: Path, layout: ParallelLayout) -> None:
    check_pack(folder, layout, PACKS["ragged pack"], family=FAMILY, recompute=Recompute.full)


def test_a_tied_head_is_the_embedding(layout: ParallelLayout, tmp_path: Path) -> None:
    check_pack(tiny_vl.write_qwen3_vl(tmp_path, tied=True), layout, PACKS["video"], family=FAMILY)


def test_the_whole_vocabulary_row_equals_transformers_after_minutes(folder: Path, layout: ParallelLayout) -> None:
    check_vocabulary_rows(folder, layout, [HOUR, FILM], family=FAMILY, with_positions=False)


def test_deepstack_and_positions_reach_the_pipeline_stages(
    folder: Path, layout: ParallelLayout, tmp_path: Path
) -> None:
    check_stages(folder, layout, family=FAMILY, out=tmp_path)


def test_every_step_has_its_time_in_words(folder: Path) -> None:
    """Frames 0.1 s apart, the last of five twice: steps in the middle of 0.0 and 0.1, 0.2 and 0.3, and at 0.4."""
    tokens = FAMILIES[FAMILY].read_tokens(folder)
    ids = make_builder(folder, FAMILY).videos.video_ids(ODD.selection)
    assert ids.count(MEDIA_TOKEN) == 3 * 2 * 3
    marks = tokens.encode_markup("<|vision_start|>") + [MEDIA_TOKEN] * 6 + tokens.encode_markup("<|vision_end|>")
    times = [f"<{seconds:.1f} seconds>" for seconds in (0.05, 0.25, 0.4)]
    assert ids == [token for text in times for token in (*tokens.encode(text), *marks)]
