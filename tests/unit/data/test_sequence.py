"""The one sequence builder, by hand: a tokenizer of single characters and a frame of three vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from megalong.data.batches import build_prompts
from megalong.data.sequence import TEXT_THINKING_TEMPLATE, THINKING_TEMPLATE, SequenceBuilder, continued
from megalong.models.longvila.layout import SquareFrames
from megalong.records import MEDIA_TOKEN, FrameSelection, Sample

NEWLINE, EOS = 10, 3
SAMPLE = Sample(
    sample_id="s1", question="Which?", answer="B", videos=("v.mp4",), problem_type="multiple choice",
    category="temporal", reasoning="It rains.", subtitles="",
)  # fmt: skip
HEAD = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


BUILDER = SequenceBuilder(
    encode=encode,
    encode_markup=encode,
    eos_id=EOS,
    videos=SquareFrames(size=8, tokens_per_frame=3, newline_id=NEWLINE),
    system_prompt="Be brief",
    thinking=False,
)


def selection(path: str, count: int) -> FrameSelection:
    return FrameSelection(
        path=path, frames=tuple(range(count)), seconds=tuple(float(i) for i in range(count)), height=8, width=8
    )


def test_video_comes_first_and_every_frame_ends_in_a_newline() -> None:
    prompt = BUILDER.prompt(SAMPLE, [selection("v.mp4", 2)])
    frame = [MEDIA_TOKEN, MEDIA_TOKEN, MEDIA_TOKEN, NEWLINE]
    assert list(prompt.ids_P) == encode(HEAD) + frame + frame + encode("Which?" + TAIL)
    assert prompt.sample is SAMPLE
    assert prompt.selections == (selection("v.mp4", 2),)


def test_two_videos_follow_one_another_in_the_sample_s_order() -> None:
    sample = replace(SAMPLE, videos=("v.mp4", "w.mp4"))
    prompt = BUILDER.prompt(sample, [selection("v.mp4", 1), selection("w.mp4", 2)])
    media = [place for place, token in enumerate(prompt.ids_P) if token == MEDIA_TOKEN]
    assert len(media) == 9
    assert list(prompt.ids_P[media[0] : media[-1] + 2]) == [*[MEDIA_TOKEN] * 3, NEWLINE] * 3
    assert [item.path for item in prompt.selections] == ["v.mp4", "w.mp4"]


def test_text_only_prompt() -> None:
    prompt = BUILDER.prompt(replace(SAMPLE, videos=()), [])
    assert list(prompt.ids_P) == encode(f"{HEAD}Which?{TAIL}")
    assert prompt.selections == ()


def test_a_family_without_vision_has_its_own_template_and_refuses_videos() -> None:
    text = replace(BUILDER, videos=None, thinking=True)
    prompt = text.prompt(replace(SAMPLE, videos=()), [])
    assert list(prompt.ids_P) == encode(HEAD + TEXT_THINKING_TEMPLATE.format(question="Which?") + TAIL)
    assert "video" not in TEXT_THINKING_TEMPLATE
    assert prompt.positions_P.tolist() == list(range(len(prompt.ids_P)))
    assert prompt.next_position == len(prompt.ids_P)
    with pytest.raises(ValueError, match=r"s1: has videos, and this model family has no vision; see model\.family"):
        text.prompt(SAMPLE, [selection("v.mp4", 1)])


def test_without_a_system_prompt_there_is_no_system_turn() -> None:
    prompt = replace(BUILDER, system_prompt="").prompt(replace(SAMPLE, videos=()), [])
    assert list(prompt.ids_P) == encode(f"<|im_start|>user\nWhich?{TAIL}")


def test_positions_are_the_layout_s() -> None:
    class Layout(SquareFrames):
        def positions(self, ids: Sequence[int], selections: Sequence[FrameSelection]) -> tuple[torch.Tensor, int]:
            return torch.full((3, len(ids)), len(selections)), 7

    layout = Layout(size=8, tokens_per_frame=3, newline_id=NEWLINE)
    prompt = replace(BUILDER, videos=layout).prompt(SAMPLE, [selection("v.mp4", 2)])
    assert torch.equal(prompt.positions_P, torch.ones(3, len(prompt.ids_P), dtype=torch.int64))
    assert prompt.next_position == 7
    plain = BUILDER.prompt(SAMPLE, [selection("v.mp4", 2)])
    assert plain.positions_P.tolist() == list(range(len(plain.ids_P)))
    assert plain.next_position == len(plain.ids_P)


def test_thinking_asks_with_the_template_that_the_model_was_trained_with() -> None:
    prompt = replace(BUILDER, thinking=True).prompt(replace(SAMPLE, videos=()), [])
    assert list(prompt.ids_P) == encode(HEAD + THINKING_TEMPLATE.format(question="Which?") + TAIL)
    assert THINKING_TEMPLATE.endswith("\n\n Question: {question}")
    assert THINKING_TEMPLATE.startswith(
        "You are a helpful assistant. The user asks a question, and then you solves it."
    )


@pytest.mark.parametrize("thinking", [False, True])
def test_only_the_chat_format_is_read_as_markup(thinking: bool) -> None:
    """Whatever the question, its subtitles, the reasoning and the answer spell, they cannot end or begin a turn."""
    read: list[str] = []
    builder = replace(BUILDER, thinking=thinking, encode_markup=lambda text: read.append(text) or encode(text))
    sample = replace(
        SAMPLE, question="<|im_end|>?", subtitles="<|im_start|>", reasoning="<|im_end|>", answer="<|im_end|>"
    )
    prompt = builder.prompt(sample, [selection("v.mp4", 1)])
    assert read == [HEAD, TAIL]
    text = "".join(chr(token) for token in prompt.ids_P if token != MEDIA_TOKEN)
    assert text == f"{HEAD}\n{builder.user_text(sample)}{TAIL}"
    builder.target(sample)
    assert read == [HEAD, TAIL]


@pytest.mark.parametrize("thinking", [False, True])
def test_subtitles_stand_before_the_question(thinking: bool) -> None:
    sample = replace(SAMPLE, subtitles="[00:01] hello\n[00:02] bye")
    text = replace(BUILDER, thinking=thinking).user_text(sample)
    want = "Subtitles:\n[00:01] hello\n[00:02] bye\n\nWhich?"
    assert text == (THINKING_TEMPLATE.format(question=want) if thinking else want)


def test_braces_in_a_question_are_text() -> None:
    assert "{x} and {}" in replace(BUILDER, thinking=True).user_text(replace(SAMPLE, question="{x} and {}"))


def test_target_with_and_without_thinking() -> None:
    assert list(BUILDER.target(SAMPLE)) == [*encode("B"), EOS]
    thinking = replace(BUILDER, thinking=True)
    assert list(thinking.target(SAMPLE)) == [*encode("<think>It rains.</think><answer>B</answer>"), EOS]


def test_thinking_target_needs_a_reasoning() -> None:
    with pytest.raises(ValueError, match=r"s1: no reasoning in the manifest.*data\.thinking=false"):
        replace(BUILDER, thinking=True).target(replace(SAMPLE, reasoning=""))


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("<think>t</think><answer>C</answer>", "<think>t</think><answer>B</answer>"),
        ("<think>t</think> <answer>C", "<think>t</think> <answer>B</answer>"),
        ("<answer>C</answer><answer>D</answer>", "<answer>C</answer><answer>B</answer>"),
        ("no tags at all", "no tags at all<answer>B</answer>"),
        ("", "<answer>B</answer>"),
    ],
)
def test_another_answer_behind_a_response(response: str, text: str) -> None:
    assert list(replace(BUILDER, thinking=True).answered(response, "B")) == [*encode(text), EOS]
    assert list(BUILDER.answered(response, "B")) == [*encode("B"), EOS]


def test_a_prompt_goes_on_where_its_response_starts() -> None:
    prompt = BUILDER.prompt(SAMPLE, [selection("v.mp4", 1)])
    longer = continued(prompt, [7, 8])
    assert longer.ids_P == (*prompt.ids_P, 7, 8)
    assert longer.positions_P.tolist() == list(range(len(longer.ids_P)))
    assert longer.next_position == prompt.next_position + 2
    rows = replace(prompt, positions_P=prompt.positions_P.expand(3, -1) // 2, next_position=40)  # M-RoPE
    assert continued(rows, [7, 8]).positions_P[:, -3:].tolist() == [[len(prompt.ids_P[1:]) // 2, 40, 41]] * 3
    assert continued(rows, [7, 8]).next_position == 42


def test_selections_must_match_the_videos() -> None:
    with pytest.raises(ValueError, match="s1: 1 videos but 2 frame selections"):
        BUILDER.prompt(SAMPLE, [selection("v.mp4", 1), selection("w.mp4", 1)])


def test_the_encoder_s_own_lists_are_not_changed() -> None:
    """A tokenizer may hand out the same list twice."""
    memory: dict[str, list[int]] = {}

    def same(text: str) -> list[int]:
        return memory.setdefault(text, encode(text))

    builder = replace(BUILDER, encode=same, encode_markup=same)
    first = builder.prompt(SAMPLE, [selection("v.mp4", 1)])
    assert builder.prompt(SAMPLE, [selection("v.mp4", 1)]) == first


def test_build_prompts_leaves_out_unreadable_videos_and_drops_long_prompts() -> None:
    unreadable = replace(SAMPLE, sample_id="s2", videos=("gone.mp4",))
    half_unreadable = replace(SAMPLE, sample_id="s3", videos=("v.mp4", "gone.mp4"))
    long = replace(SAMPLE, sample_id="s4", question="Which?" * 9)
    text = replace(SAMPLE, sample_id="s5", videos=())
    limit = len(BUILDER.prompt(SAMPLE, [selection("v.mp4", 2)]).ids_P)
    prompts, dropped = build_prompts(
        [SAMPLE, unreadable, half_unreadable, long, text],
        {"v.mp4": selection("v.mp4", 2)},
        BUILDER,
        max_prompt_tokens=limit,
        max_response_tokens=4,
        max_positions=limit + 4,
    )
    assert [prompt.sample.sample_id for prompt in prompts] == ["s1", "s5"]
    assert [(drop.sample_id, drop.stage) for drop in dropped] == [("s4", "prompt")]
    assert dropped[0].reason == (
        f"prompt of {limit + 48} tokens is over data.max_prompt_tokens={limit}; "
        "raise it, or lower video.num_frames or video.max_frames"
    )


def test_a_prompt_whose_positions_leave_no_room_for_a_response_is_dropped() -> None:
    """Of a video that lasts too long, where positions follow its time and tokens are no measure."""
    last = BUILDER.prompt(SAMPLE, [selection("v.mp4", 2)]).next_position
    limits = {"max_prompt_tokens": 1000, "max_response_tokens": 5}
    arguments = [SAMPLE], {"v.mp4": selection("v.mp4", 2)}, BUILDER
    assert len(build_prompts(*arguments, **limits, max_positions=last + 5)[0]) == 1
    prompts, (drop,) = build_prompts(*arguments, **limits, max_positions=last + 4)
    assert prompts == []
    assert (drop.sample_id, drop.stage) == ("s1", "prompt")
    assert drop.reason == (
        f"the prompt ends at position {last}, which with data.max_response_tokens=5 is over the model's {last + 4} "
        "positions; cut the video, or lower data.max_response_tokens"
    )
