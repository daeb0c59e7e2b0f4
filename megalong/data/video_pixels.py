"""Decoded pictures to RGB frames of the wanted size, on whatever device they are: the GPU twin of PyAV's conversion.

Colours by the matrix and range a file declares, the resize bicubic with antialiasing as in `video.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalong.data.video_index import Orientation
from megalong.data.video_segments import Coding

_LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}  # weights of red and blue


def rgb_of_nv12(luma_FHW: Tensor, chroma_FhwC: Tensor, coding: Coding, *, bits: int = 8) -> Tensor:
    """[F, 3, H, W] float32 in 0..255 (not rounded) of pictures with half as many chroma samples each way.

    chroma: [F, H/2, W/2, 2], blue then red difference. bits: 8, or 16 for samples in the upper bits of 16.
    """
    scale = 1.0 if bits == 8 else 1.0 / 256
    luma_FHW = luma_FHW.float() * scale
    chroma_FCHW = torch.nn.functional.interpolate(
        chroma_FhwC.permute(0, 3, 1, 2).float() * scale - 128.0, scale_factor=2, mode="nearest"
    )
    blue_FHW, red_FHW = chroma_FCHW.unbind(1)
    if not coding.full_range:
        luma_FHW = (luma_FHW - 16.0) * (255.0 / 219.0)
        blue_FHW, red_FHW = blue_FHW * (255.0 / 224.0), red_FHW * (255.0 / 224.0)
    red, blue = _LUMA[coding.matrix]
    green = 1.0 - red - blue
    return torch.stack(
        (
            luma_FHW + 2 * (1 - red) * red_FHW,
            luma_FHW - 2 * (red * (1 - red) * red_FHW + blue * (1 - blue) * blue_FHW) / green,
            luma_FHW + 2 * (1 - blue) * blue_FHW,
        ),
        dim=1,
    ).clamp_(0, 255)


def recolour(rgb_FCHW: Tensor, coding: Coding, *, black: float = 16.0, grey: float = 128.0) -> Tensor:
    """RGB that was made with BT.601's matrix, as the matrix of the file makes it. Float in, float out.

    black, grey: what was taken, when it was made, for the luma of black (of the limited range) and for no colour.
    """
    luma, chroma = 16.0 - black, 128.0 - grey
    luma, chroma = (0.0, chroma) if coding.full_range else (luma * 255 / 219, chroma * 255 / 224)
    excess = (_to_rgb("bt601") @ torch.tensor((luma, chroma, chroma), dtype=torch.float64)).to(rgb_FCHW)
    rgb_FCHW = rgb_FCHW - excess[:, None, None]
    if coding.matrix != "bt601":
        change = (_to_rgb(coding.matrix) @ torch.linalg.inv(_to_rgb("bt601"))).to(rgb_FCHW)
        rgb_FCHW = torch.einsum("ij,fjhw->fihw", change, rgb_FCHW)
    return rgb_FCHW.clamp_(0, 255)


def _to_rgb(matrix: str) -> Tensor:
    """[3, 3] float64: luma, blue and red difference (full range) to RGB."""
    red, blue = _LUMA[matrix]
    green = 1 - red - blue
    rows = (
        (1.0, 0.0, 2 * (1 - red)),
        (1.0, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green),
        (1.0, 2 * (1 - blue), 0.0),
    )
    return torch.tensor(rows, dtype=torch.float64)


def resized(rgb_FCHW: Tensor, *, height: int, width: int, orientation: Orientation) -> Tensor:
    """[F, height, width, 3] uint8 of float RGB in 0..255; height and width as displayed, the pictures as stored."""
    size = (width, height) if orientation.transpose else (height, width)
    small_FCHW = torch.nn.functional.interpolate(
        rgb_FCHW, size=size, mode="bicubic", antialias=True, align_corners=False
    )
    pixels_FHWC = small_FCHW.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    if orientation.transpose:
        pixels_FHWC = pixels_FHWC.transpose(1, 2)
    flipped = [dim for dim, turned in ((2, orientation.mirror_x), (1, orientation.mirror_y)) if turned]
    return pixels_FHWC.flip(flipped).contiguous() if flipped else pixels_FHWC.contiguous()
