"""M-RoPE: positions in time, height and width of the tokens of a prompt with pictures and videos.

Text counts on in all three; a vision token stands at its step's time, its row and its column, counted from where the
text before it ended; what follows starts one after the largest of the three. That is the rule of the Qwen2-VL report,
of transformers up to 5.2, of vLLM, and of `rope_deltas` in every version of transformers. (The prompt's own text after
a video is placed elsewhere by transformers from 5.3 on, when the video's time runs further than its rows and columns.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalong.records import MEDIA_TOKEN, FrameSelection

# Seconds are made from timestamps kept as floats: a time this close below a tick has reached it.
_ON_TICK = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """One unbroken run of vision tokens: steps x rows x columns."""

    ticks: tuple[int, ...]  # temporal position of each step, from 0
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return len(self.ticks) * self.rows * self.columns


def step_ticks(selection: FrameSelection, *, frames_per_step: int, ticks_per_second: float) -> tuple[int, ...]:
    """Temporal positions of a video's steps, from 0: whole ticks at the mean distance of its frames."""
    # A last frame that is repeated to fill its step says nothing about the distance.
    intervals = len(set(selection.frames)) - 1
    spacing = (selection.seconds[-1] - selection.seconds[0]) / intervals if intervals else 0.0
    per_step = spacing * frames_per_step * ticks_per_second
    return tuple(int(step * per_step + _ON_TICK) for step in range(len(selection.frames) // frames_per_step))


def mrope_positions(ids: Sequence[int], grids: Sequence[Grid]) -> tuple[Tensor, int]:
    """Positions [3, P] int64 (time, row, column) of a prompt, and the position of what follows it.

    ids: the prompt, MEDIA_TOKEN at vision tokens; grids: one per run of MEDIA_TOKEN, in order. Raises ValueError when
    the runs are not those of the grids.
    """
    media_P = torch.tensor(ids) == MEDIA_TOKEN
    _, lengths = torch.unique_consecutive(media_P, return_counts=True)
    found = iter(grids)
    pieces: list[Tensor] = []
    at, position = 0, 0
    for length in lengths.tolist():
        if media_P[at]:
            grid = next(found, None)
            if grid is None or grid.num_tokens != length:
                expected = "none" if grid is None else grid.num_tokens
                raise ValueError(f"{length} vision tokens in a row at token {at}, expected {expected}")
            piece = _grid_positions(grid) + position
        else:
            piece = (torch.arange(length) + position).expand(3, length)
        pieces.append(piece)
        at, position = at + length, int(piece.max()) + 1
    if next(found, None) is not None:
        raise ValueError(f"more grids ({len(grids)}) than runs of vision tokens in the prompt")
    return torch.cat(pieces, dim=1) if pieces else torch.zeros((3, 0), dtype=torch.int64), position


def _grid_positions(grid: Grid) -> Tensor:
    axes = (torch.tensor(grid.ticks), torch.arange(grid.rows), torch.arange(grid.columns))
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
