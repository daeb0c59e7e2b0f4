"""Prompts of the next batch, built by the one sequence builder; too long ones are dropped and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megalong.data.sequence import SequenceBuilder
from megalong.records import Dropped, FrameSelection, Prompt, Sample


def build_prompts(
    samples: Sequence[Sample],
    selections: Mapping[str, FrameSelection],
    builder: SequenceBuilder,
    *,
    max_prompt_tokens: int,
) -> tuple[list[Prompt], list[Dropped]]:
    """Prompts of the samples whose videos all have a selection, and a Dropped for each that is too long."""
    prompts, dropped = [], []
    for sample in samples:
        if any(path not in selections for path in sample.videos):
            continue  # its Dropped record was made where the video could not be read
        prompt = builder.prompt(sample, [selections[path] for path in sample.videos])
        if len(prompt.ids_P) > max_prompt_tokens:
            reason = (
                f"prompt of {len(prompt.ids_P)} tokens is over data.max_prompt_tokens={max_prompt_tokens}; "
                "raise it, or lower video.num_frames or video.max_frames"
            )
            dropped.append(Dropped(sample_id=sample.sample_id, stage="prompt", reason=reason))
        else:
            prompts.append(prompt)
    return prompts, dropped
