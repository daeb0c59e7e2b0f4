"""Towers of the Qwen-VL families: steps are independent, and a cast leaves the rotary frequencies alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_vl
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from megalong.engine.weights_io import CheckpointReader
from megalong.models.families import FAMILIES
from megalong.models.qwen2_5_vl.pixels import patches


@pytest.fixture(scope="module", params=tiny_vl.WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny_vl.WRITERS[request.param](tmp_path_factory.mktemp(request.param))


def load_encoder(family: str, path: Path) -> nn.Module:
    spec, reader = FAMILIES[family].read_spec(path), CheckpointReader(path, ("",))
    encoder = FAMILIES[family].vision.encoder(spec)
    encoder.load_state_dict({name: reader.read(name) for name, _ in encoder.named_parameters()})
    return encoder


def random_frames(num_frames: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    block = 2 * tiny_vl.PATCH
    return torch.randint(0, 256, (num_frames, rows * block, columns * block, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("cuts", [(0, 2, 10), (0, 4, 6, 10), (0, 2, 4, 6, 8, 10)])
def test_frames_may_be_cut_at_any_step(folder: tuple[str, Path], cuts: tuple[int, ...]) -> None:
    """Five columns and three rows of embeddings: windows of 2 x 2 with a rest on both sides."""
    encoder, frames_FHWC = load_encoder(*folder), random_frames(10, 3, 5)
    with torch.no_grad():
        whole = encoder(frames_FHWC)
        parts = [encoder(frames_FHWC[first:last]) for first, last in zip(cuts, cuts[1:], strict=False)]
        changed = frames_FHWC.clone()
        changed[4:6] = 255 - changed[4:6]
        other = encoder(changed)
    assert whole.shape[:2] == (5, 15)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert (other - whole).abs().amax(dim=(1, 2)).gt(1e-3).tolist() == [False, False, True, False, False]


def test_an_odd_last_frame_fills_its_step(folder: tuple[str, Path]) -> None:
    encoder, frames_FHWC = load_encoder(*folder), random_frames(3, 2, 2)
    with torch.no_grad():
        got = encoder(frames_FHWC)
        want = encoder(frames_FHWC[[0, 1, 2, 2]])
    assert torch.equal(got, want)


def test_a_bfloat16_tower_turns_by_the_same_angles_as_the_stock_one(folder: tuple[str, Path]) -> None:
    family, path = folder
    encoder = load_encoder(family, path).to(torch.bfloat16)
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).model.visual
    buffers = dict(encoder.visual.named_buffers())
    for name, buffer in stock.named_buffers():
        assert buffers[name].dtype == torch.float32
        assert torch.equal(buffers[name], buffer)
    frames_FHWC = random_frames(4, 3, 4)
    with torch.no_grad():
        got = encoder(frames_FHWC)
        rows = patches(frames_FHWC, rule=encoder.rule, tower=encoder.tower).to(torch.bfloat16)
        want = stock(rows, grid_thw=torch.tensor([[2, 6, 8]])).pooler_output
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.flatten(0, 1)[:, : want.shape[1]], want)


def test_the_projector_is_what_stands_before_the_llm(folder: tuple[str, Path]) -> None:
    family, path = folder
    encoder = load_encoder(family, path).requires_grad_(False)
    encoder.projector.requires_grad_(True)
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in encoder.named_parameters() if "merger" in name}
    assert len(trained) == (5 if family == "qwen2_5_vl" else 18)
