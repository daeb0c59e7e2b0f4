"""Vision side of longvila: transformers' SigLIP tower and the downsampling projector."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from megalong.models.longvila.spec import LongVilaSpec


def space_to_depth(features_FSD: Tensor, *, factor: int) -> Tensor:
    """[F, S, D] patch features of square frames -> [F, ceil(side/factor)^2, factor^2 * D].

    Each output token is a factor x factor block, row by row; an odd side is padded with zeros below
    and to the right (VILA's mlp_downsample).
    """
    frames, patches, width = features_FSD.shape
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches per frame are not a square grid")
    grid = features_FSD.reshape(frames, side, side, width)
    missing = -side % factor
    grid = F.pad(grid, (0, 0, 0, missing, 0, missing))
    blocks = (side + missing) // factor
    grid = grid.reshape(frames, blocks, factor, blocks, factor, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(frames, blocks * blocks, factor * factor * width)


def pool_tokens(tokens_FND: Tensor, *, pool: tuple[int, int, int]) -> Tensor:
    """[F, N, D] tokens of square frames -> [F / pool[0], N / (pool[1] * pool[2]), D]: means over frames, rows, columns,
    one after the other (VILA's TSPVideoEncoder)."""
    frames, count, width = tokens_FND.shape
    side = round(count**0.5)
    grid = tokens_FND.reshape(frames, side, side, width)
    for dim, size in enumerate(pool):
        if size > 1:
            grid = grid.unflatten(dim, (-1, size)).mean(dim + 1)
    return grid.flatten(1, 2)


class Projector(nn.Module):
    """mlp_downsample: space-to-depth, LayerNorm, Linear, exact GELU, Linear; 3x3 has one more of the first three, at
    the width of three patches. Indexes match the checkpoint's names."""

    def __init__(self, *, vision_hidden: int, hidden: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        width, layers = vision_hidden * factor * factor, [nn.Identity()]
        if factor == 3:
            narrow = vision_hidden * factor
            layers += [nn.LayerNorm(width), nn.Linear(width, narrow), nn.GELU()]
            width = narrow
        layers += [nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features_FSD: Tensor) -> Tensor:
        return self.layers(space_to_depth(features_FSD, factor=self.factor))


class VisionEncoder(nn.Module):
    """uint8 frames to LLM-space embeddings. Steps (one frame, or as many as are pooled) are independent, so they can be
    split over ranks.

    Runs the layers up to hidden_states[select_layer] and nothing behind them: the tower's last block and its
    post_layernorm are not part of the model (an export copies them from the source checkpoint).
    """

    def __init__(self, spec: LongVilaSpec) -> None:
        super().__init__()
        self.pool = spec.vision.pool
        config = {**spec.tower_config, "vision_use_head": False, "num_hidden_layers": spec.vision.layers_run}
        self.settings = f"longvila {spec.vision} {json.dumps(config, sort_keys=True)}"
        tower = SiglipVisionModel(SiglipVisionConfig(**config))
        tower = getattr(tower, "vision_model", tower)  # transformers before 5.20 nests it
        self.embeddings, self.encoder = tower.embeddings, tower.encoder
        self.projector = Projector(
            vision_hidden=spec.vision.hidden, hidden=spec.gpt.hidden, factor=spec.vision.downsample
        )

    def forward(self, frames_FHWC: Tensor) -> Tensor:
        """frames_FHWC: [F, H, W, 3] uint8 RGB, F a multiple of the frames of a step.

        Returns [F / frames per step, embeds per step, D] in the parameters' dtype.
        """
        dtype = self.projector.layers[2].weight.dtype
        # SiglipImageProcessor: rescale by 1/255, then mean 0.5 and standard deviation 0.5.
        pixels = frames_FHWC.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        hidden = self.embeddings(pixels.to(dtype))
        hidden = self.encoder(inputs_embeds=hidden).last_hidden_state
        return pool_tokens(self.projector(hidden), pool=self.pool)
