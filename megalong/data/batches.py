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
    max_response_tokens: int,
    max_positions: int,
) -> tuple[list[Prompt], list[Dropped]]:
    """Prompts of the samples whose videos all have a selection, and a Dropped for each that is too long.

    max_positions: of the model, for the prompt and the longest response.
    """
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
        elif prompt.next_position + max_response_tokens > max_positions:
            reason = (
                f"the prompt ends at position {prompt.next_position}, which with data.max_response_tokens="
                f"{max_response_tokens} is over the model's {max_positions} positions; cut the video, or lower "
                "data.max_response_tokens"
            )
            dropped.append(Dropped(sample_id=sample.sample_id, stage="prompt", reason=reason))
        else:
            prompts.append(prompt)
    return prompts, dropped
