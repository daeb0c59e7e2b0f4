"""Sizes and patches of the Qwen-VL families against transformers' own processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from megalong.config.qwen_vl_shape import PixelRule, TowerShape
from megalong.models.qwen2_5_vl.pixels import fit_to_pixels, patches

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RULE = PixelRule(min_pixels=1, max_pixels=1 << 20, max_video_tokens=0, mean=MEAN, std=STD)


def tower(patch_size: int) -> TowerShape:
    return TowerShape(
        hidden=1, layers=1, full_layers=1, window_patches=1, ffn=1, patch_size=patch_size, merge_size=2,
        frames_per_step=2, deepstack=0, positions=0, out=1,
    )  # fmt: skip


def test_sizes_equal_transformers_over_many_shapes() -> None:
    limits = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
    shapes = np.random.RandomState(0).randint(20, 2000, size=(400, 2)).tolist()
    shapes += [[28, 28], [14, 14], [42, 70], [5, 900], [900, 5], [1080, 1920], [2160, 3840]]
    sizes = set()
    for height, width in shapes:
        size = fit_to_pixels(height, width, factor=28, **limits)
        assert size == smart_resize(height, width, factor=28, **limits), (height, width)
        sizes.add(size)
    assert len(sizes) > 50


def test_a_picture_of_extreme_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="20 x 4001 pixels: one side is over 200 times"):
        fit_to_pixels(20, 4001, factor=28, min_pixels=1, max_pixels=1 << 20)
    assert fit_to_pixels(20, 4000, factor=28, min_pixels=1, max_pixels=1 << 20) == (28, 4004)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (8, 8), (24, 16)])
def test_patches_of_a_picture_equal_the_stock_processor(height: int, width: int) -> None:
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2)
    picture_HWC = np.random.RandomState(1).randint(0, 256, (height, width, 3)).astype(np.uint8)
    want = processor(images=[picture_HWC], do_resize=False, return_tensors="pt")["pixel_values"]
    got = patches(torch.from_numpy(picture_HWC)[None], rule=RULE, tower=tower(4))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_each_column_is_a_channel_a_frame_of_the_step_and_a_pixel() -> None:
    frames_FHWC = torch.randint(0, 256, (4, 8, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    got = patches(frames_FHWC, rule=RULE, tower=tower(2))
    assert got.shape == (2 * 4 * 8, 3 * 2 * 2 * 2)
    row = 0
    for step in range(2):
        for block_row in range(2):
            for block_column in range(4):
                for patch_row in range(2):
                    for patch_column in range(2):
                        top, left = 4 * block_row + 2 * patch_row, 4 * block_column + 2 * patch_column
                        cut_FHWC = frames_FHWC[2 * step : 2 * step + 2, top : top + 2, left : left + 2]
                        want = (cut_FHWC.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
                        torch.testing.assert_close(
                            got[row].double(), want.permute(3, 0, 1, 2).flatten(), rtol=0, atol=1e-5
                        )
                        row += 1


def test_an_odd_last_frame_fills_its_step_twice() -> None:
    frames_FHWC = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8)
    arguments = {"rule": RULE, "tower": tower(2)}
    filled_FHWC = torch.cat((frames_FHWC, frames_FHWC[-1:]))
    assert torch.equal(patches(frames_FHWC, **arguments), patches(filled_FHWC, **arguments))


def test_frames_that_are_no_multiple_of_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="frames of 6 x 8 pixels, expected multiples of 4"):
        patches(torch.zeros(2, 6, 8, 3), rule=RULE, tower=tower(2))
