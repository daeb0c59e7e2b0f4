"""qwen2_5_vl in Megatron against transformers' Qwen2_5_VLForConditionalGeneration on the same files.

Positions are handed to the stock model only where its own are known to differ: for text after a video that is longer
than wide, see models/qwen2_5_vl/positions.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_vl
from qwen_vl_oracle import FILM, HOUR, PACKS, Pack, check_pack, check_stages, check_vocabulary_rows

from megalong.parallel.layout import ParallelLayout

FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vl.write_qwen2_5_vl(tmp_path_factory.mktemp(FAMILY))


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_logprobs_and_gradients_equal_transformers(folder: Path, layout: ParallelLayout, pack: Pack) -> None:
    check_pack(folder, layout, pack, family=FAMILY)


def test_a_tied_head_is_the_embedding(layout: ParallelLayout, tmp_path: Path) -> None:
    check_pack(tiny_vl.write_qwen2_5_vl(tmp_path, tied=True), layout, PACKS["video"], family=FAMILY)


def test_the_whole_vocabulary_row_equals_transformers_after_minutes(folder: Path, layout: ParallelLayout) -> None:
    """64 frames two seconds apart: M-RoPE reaches further in time than in space."""
    item = check_vocabulary_rows(folder, layout, [HOUR, FILM], family=FAMILY, with_positions=True)
    assert int(item.prompt.positions_P[0].max()) > 248


def test_positions_reach_every_pipeline_stage(folder: Path, layout: ParallelLayout, tmp_path: Path) -> None:
    check_stages(folder, layout, family=FAMILY, out=tmp_path)
