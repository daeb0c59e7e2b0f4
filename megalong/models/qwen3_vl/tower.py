"""Vision side of qwen3_vl: transformers' tower, its merger and its deepstack mergers, on frames of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from megalong.models.qwen2_5_vl.pixels import patches
from megalong.models.qwen2_5_vl.tower import keep_float32_buffers, written_vision_config
from megalong.models.qwen3_vl.spec import Qwen3VlSpec


class VisionEncoder(nn.Module):
    """uint8 frames to LLM-space embeddings, and beside each those that the first layers of the LLM add.

    Attention stays inside a step: frames can be split over ranks at any step.
    """

    def __init__(self, spec: Qwen3VlSpec) -> None:
        super().__init__()
        self.tower, self.rule = spec.tower, spec.video
        self.settings = f"qwen3_vl {spec.tower} {spec.video.mean} {spec.video.std} {written_vision_config(spec.path)}"
        config = Qwen3VLConfig.from_pretrained(spec.path).vision_config
        self.visual = Qwen3VLVisionModel._from_config(config)

    @property
    def projector(self) -> nn.Module:
        """What stands between the tower's blocks and the LLM."""
        return nn.ModuleList([self.visual.merger, self.visual.deepstack_merger_list])

    def forward(self, frames_FHWC: Tensor) -> Tensor:
        """frames_FHWC: [F, H, W, 3] uint8 RGB, H and W multiples of spec.tower.block; an odd last frame counts twice.

        Returns [steps, H/block * W/block, (1 + levels) * D] in the parameters' dtype: the embedding, then one vector
        for each deepstack level.
        """
        tower = self.tower
        rows = patches(frames_FHWC, rule=self.rule, tower=tower)
        steps = -(-len(frames_FHWC) // tower.frames_per_step)
        height, width = (side // tower.patch_size for side in frames_FHWC.shape[1:3])
        grid_13 = torch.tensor([[steps, height, width]], device=frames_FHWC.device)
        out = self.visual(rows.to(self.visual.dtype), grid_thw=grid_13)
        embeds_ND = torch.cat((out.pooler_output, *out.deepstack_features), dim=-1)
        return embeds_ND.reshape(steps, -1, embeds_ND.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return keep_float32_buffers(self, lambda: super(VisionEncoder, self)._apply(fn, recurse))
