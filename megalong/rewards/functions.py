"""Reward functions: what one response to one sample earns, in [0, 1].

To add one: write `fn(response, sample) -> float` and give it a line in REWARDS; the contract test covers it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from megalong.config.errors import ConfigError
from megalong.rewards.extract import TAGS, final_answer, normalise_text, read_number, read_option

if TYPE_CHECKING:
    from megalong.records import Sample  # imports torch

RewardFn = Callable[[str, "Sample"], float]
AnswerCheck = Callable[[str, str], bool]
"""(answer, truth) -> whether the answer is right; `answer` is free of tags and reasoning."""

WELL_FORMED = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
BARE_OPTION = re.compile(r"\(?[A-Za-z]\)?\.?")


def same_option(answer: str, truth: str) -> bool:
    """Both state the same option letter."""
    letter = read_option(answer)
    return letter is not None and letter == read_option(truth)


def same_number(answer: str, truth: str) -> bool:
    """Both state the same number, as exactly as the truth was stated.

    Truth with d > 0 decimals: within half a unit of its last digit (3.1416 is right for "3.14"). Any other
    truth: within 1e-6 relative, so integers are exact. Units are not compared, and "%" is a unit.
    """
    got, want = read_number(answer), read_number(truth)
    if got is None or want is None:
        return False
    tolerance = 0.5 * 10.0**-want.decimals if want.decimals else 1e-6 * abs(want.value)
    # Half a unit itself is in: 0.125 is right for "0.13"; binary fractions need a little room.
    return abs(got.value - want.value) <= tolerance * (1 + 1e-9)


def same_text(answer: str, truth: str) -> bool:
    """Both are the same words after normalise_text; a truth of only articles or punctuation: as written."""
    want = normalise_text(truth)
    if want:
        return normalise_text(answer) == want
    return bool(truth.strip()) and answer.strip().casefold() == truth.strip().casefold()


def check_by_truth(truth: str) -> AnswerCheck:
    """The check that fits how a truth is written: a bare letter, a number without a unit, or text."""
    if BARE_OPTION.fullmatch(truth.strip()):
        return same_option
    number = read_number(truth)
    return same_number if number is not None and not number.unit else same_text


def same_as_truth_reads(answer: str, truth: str) -> bool:
    """For manifests that do not say the kind: the truth decides between letter, number and text."""
    return check_by_truth(truth)(answer, truth)


ACCURACY_BY_TYPE: dict[str, AnswerCheck] = {
    "multiple choice": same_option,
    "multiple-choice": same_option,
    "numerical": same_number,
    "number": same_number,
    "open-ended": same_text,
    "free-form": same_text,
    # LongVideo-Reason's training split marks its multiple-choice and its open-ended questions alike as "general";
    # its test split names the category in that field, which the manifest's reader makes "general" too.
    "general": same_as_truth_reads,
}
"""Problem type of a manifest, casefolded and with "-" for "_" -> how its answers are checked."""


def type_key(problem_type: str) -> str:
    """The spelling of a problem type under which ACCURACY_BY_TYPE lists it."""
    return problem_type.strip().casefold().replace("_", "-")


def answer_check(sample: Sample) -> AnswerCheck:
    """How the answers to `sample` are checked. Raises ValueError for an unknown problem type."""
    key = type_key(sample.problem_type)
    if key not in ACCURACY_BY_TYPE:
        raise ValueError(
            f"sample {sample.sample_id}: problem_type {sample.problem_type!r} is unknown; "
            f"use one of {', '.join(ACCURACY_BY_TYPE)} in the manifest"
        )
    return ACCURACY_BY_TYPE[key]


def check_problem_types(samples: Iterable[Sample]) -> None:
    """Refuse, before a run starts, samples that no response could be scored on.

    Raises ValueError for an unknown problem type, and for a truth that its own check does not accept (no
    letter in a multiple-choice one, no number in a numerical one, an empty one).
    """
    for sample in samples:
        if not answer_check(sample)(sample.answer, sample.answer):
            raise ValueError(
                f"sample {sample.sample_id}: answer {sample.answer!r} cannot be read as the answer of a "
                f"{sample.problem_type!r} question; correct the answer or the problem_type in the manifest"
            )


def accuracy(response: str, sample: Sample) -> float:
    """1.0 when the final answer is right by the sample's problem type, else 0.0.

    A response without a final answer (see megalong.rewards.extract) earns 0.0.
    Raises ValueError for a problem type that check_problem_types refuses.
    """
    check = answer_check(sample)
    answer = final_answer(response)
    return float(answer is not None and check(answer, sample.answer))


def format_reward(response: str, sample: Sample) -> float:
    """1.0 when the whole response is <think>..</think>, white space, <answer>..</answer>, else 0.0.

    Nothing before or after, not even white space, and each of the four tags exactly once: a second answer,
    a nested tag or a tag quoted in the reasoning is not well formed. Empty contents are.
    """
    once = all(response.count(tag) == 1 for tag in TAGS)
    return float(once and WELL_FORMED.fullmatch(response) is not None)


REWARDS: dict[str, RewardFn] = {
    "accuracy": accuracy,
    "format": format_reward,
}
"""Names that `reward.weights` may use."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises ConfigError for an unknown reward, a weight that is not finite, or no weight other than 0."""
    problems = []
    for name in weights:
        if name not in REWARDS:
            nearest = max(REWARDS, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())
            problems.append(
                f"unknown key reward.weights.{name}; did you mean reward.weights.{nearest}? "
                f"Rewards are {', '.join(REWARDS)}"
            )
    if problems:
        raise ConfigError(problems)
    bad = {name: weight for name, weight in weights.items() if not math.isfinite(weight)}
    if bad:
        raise ConfigError(f"reward.weights must be finite numbers, got {bad}")
    if not any(weights.values()):
        raise ConfigError(f"reward.weights {dict(weights)} gives every response 0; set a weight above 0")
