"""The one sequence builder: token ids of a prompt and of an SFT target.

Rollout, old, reference and policy log-probabilities, SFT and evaluation all start from what is built here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megalong.data.video_layout import VideoLayout
from megalong.records import FrameSelection, Prompt, Sample

THINKING_TEMPLATE = (
    "You are a helpful assistant. The user asks a question, and then you solves it.\n\n"
    "Please first think deeply about the question based on the given video, and then provide the final answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n\n"
    " Question: {question}"
)
"""The prompt LongVILA-R1 was trained with, wording included: a checkpoint expects it to the letter."""

TEXT_THINKING_TEMPLATE = THINKING_TEMPLATE.replace(" based on the given video", "")
"""The same for a model that sees no video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceBuilder:
    """Turns samples into token ids and positions for one tokenizer and one video layout."""

    encode: Callable[[str], list[int]]  # of the sample's own text: no special token can come of it
    encode_markup: Callable[[str], list[int]]  # of the chat format, special tokens recognised, none added
    eos_id: int  # ends an assistant turn
    videos: VideoLayout | None  # None: a family without vision, positions 0, 1, 2, ..
    system_prompt: str  # "": no system turn
    thinking: bool  # ask for <think>..</think><answer>..</answer>

    def prompt(self, sample: Sample, selections: Sequence[FrameSelection]) -> Prompt:
        """Chat turn with the videos first, each laid out as the family does.

        Raises ValueError when the number of selections is not the sample's number of videos, or when there are videos
        and the family has no vision.
        """
        if len(selections) != len(sample.videos):
            raise ValueError(
                f"{sample.sample_id}: {len(sample.videos)} videos but {len(selections)} frame selections were given"
            )
        if selections and self.videos is None:
            raise ValueError(f"{sample.sample_id}: has videos, and this model family has no vision; see model.family")
        system = f"<|im_start|>system\n{self.system_prompt}<|im_end|>\n" if self.system_prompt else ""
        ids = [*self.encode_markup(f"{system}<|im_start|>user\n")]
        for selection in selections:
            ids += self.videos.video_ids(selection)
        ids += self.encode(self.user_text(sample))
        ids += self.encode_markup("<|im_end|>\n<|im_start|>assistant\n")
        if self.videos is None:
            positions_P, next_position = torch.arange(len(ids)), len(ids)
        else:
            positions_P, next_position = self.videos.positions(ids, selections)
        return Prompt(
            sample=sample,
            ids_P=tuple(ids),
            selections=tuple(selections),
            positions_P=positions_P,
            next_position=next_position,
        )

    def user_text(self, sample: Sample) -> str:
        question = sample.question
        if sample.subtitles:
            question = f"Subtitles:\n{sample.subtitles}\n\n{question}"
        template = TEXT_THINKING_TEMPLATE if self.videos is None else THINKING_TEMPLATE
        return template.format(question=question) if self.thinking else question

    def answered(self, response: str, answer: str) -> tuple[int, ...]:
        """A response with its last answer replaced (or, where it has none, given) and the end token.

        Without thinking, a response is the answer alone.
        """
        if not self.thinking:
            return (*self.encode(answer), self.eos_id)
        before, tag, _ = response.rpartition("<answer>")
        return (*self.encode(f"{before if tag else response}<answer>{answer}</answer>"), self.eos_id)

    def target(self, sample: Sample) -> tuple[int, ...]:
        """The assistant turn SFT learns: <think>reasoning</think><answer>answer</answer> and the end token.

        Raises ValueError when a thinking target is asked for and the sample has no reasoning.
        """
        if not self.thinking:
            return (*self.encode(sample.answer), self.eos_id)
        if not sample.reasoning:
            raise ValueError(
                f"{sample.sample_id}: no reasoning in the manifest, so there is no chain of thought to learn; "
                "add it or set data.thinking=false"
            )
        text = f"<think>{sample.reasoning}</think><answer>{sample.answer}</answer>"
        return (*self.encode(text), self.eos_id)


def continued(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    """The prompt with the first tokens of its response behind it."""
    first, count = prompt.next_position, len(ids)
    positions = torch.arange(first, first + count).expand(*prompt.positions_P.shape[:-1], count)
    return dataclasses.replace(
        prompt,
        ids_P=(*prompt.ids_P, *ids),
        positions_P=torch.cat((prompt.positions_P, positions), dim=-1),
        next_position=first + count,
    )
