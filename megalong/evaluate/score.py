"""Score the responses of a benchmark: strict and tolerant accuracy side by side, by category and overall."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from megalong.data.manifest import BENCHMARK_CATEGORIES, option_letters
from megalong.records import Sample
from megalong.rewards.extract import final_answer, normalise_text, read_option, tagged_answer
from megalong.rewards.functions import (
    AnswerCheck,
    answer_check,
    check_by_truth,
    format_reward,
    same_as_truth_reads,
    same_number,
    same_option,
    same_text,
)

OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
# "A" before a word other than "is" is an article, "I" a pronoun; "C++", "D-Day" and "U.S." are words.
LETTER_MENTION = re.compile(r"(?<![\w'’.&+-])(?:[AI](?!\s+(?!is\b)[a-z])|[B-HJ-Z])(?![\w'’&+-]|\.\w)")
NUMBER_MENTION = re.compile(r"(?<![\w.])[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?![\w])")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseScore:
    """One response."""

    strict: bool
    tolerant: bool
    well_formed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceAccuracy:
    """Multiple-choice questions answered by the option that the model finds the most likely. Fractions of 1."""

    num_questions: int
    accuracy: float  # mean over a question's samples, then over questions
    chance: float  # of guessing: mean over questions of 1 / number of options


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyRow:
    """One category, or all questions together. Fractions of 1; the mean is over questions."""

    num_questions: int
    strict: float  # mean over a question's samples, then over questions
    tolerant: float
    strict_pass: float  # questions that any of their samples gets right (pass@n)
    tolerant_pass: float
    likelihood: ChoiceAccuracy | None  # None: no multiple-choice question, or eval.likelihood=false


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """What `evaluate_responses` returns."""

    categories: dict[str, AccuracyRow]  # in the paper's order, then alphabetical
    overall: AccuracyRow  # over questions, not over categories
    num_samples: int  # responses per question
    format_rate: float  # fraction of responses that earn the format reward
    mean_response_chars: float
    unread: int = 0  # questions that no response was made for: counted as answered wrongly
    weights: str = ""  # what was scored

    def to_json(self) -> str:
        """All fields, indented, fractions of 1."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def to_table(self) -> str:
        """Plain text in percent: a line for each way of scoring, a column for each category, then Overall."""
        rows = [*self.categories.values(), self.overall]
        lines = [("Accuracy (%)", *(name.capitalize() for name in self.categories), "Overall")]
        shown = {"strict": "strict", "tolerant": "tolerant"}
        if self.num_samples > 1:
            shown |= {
                "strict_pass": f"strict pass@{self.num_samples}",
                "tolerant_pass": f"tolerant pass@{self.num_samples}",
            }
        for field, title in shown.items():
            lines.append((title, *(f"{100 * getattr(row, field):.1f}" for row in rows)))
        lines.append(("questions", *(str(row.num_questions) for row in rows)))
        if self.overall.likelihood:
            for field, title in (("accuracy", "likelihood"), ("chance", "  by chance")):
                shares = (getattr(row.likelihood, field, None) for row in rows)
                lines.append((title, *("-" if share is None else f"{100 * share:.1f}" for share in shares)))
            counts = (row.likelihood.num_questions if row.likelihood else 0 for row in rows)
            lines.append(("  questions", *map(str, counts)))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [
            "  ".join(
                [line[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            )
            for line in lines
        ]
        text.append(
            f"samples per question: {self.num_samples}   well-formed: {100 * self.format_rate:.1f}%   "
            f"mean response: {self.mean_response_chars:.0f} characters"
        )
        if self.unread:
            text.append(f"unread: {self.unread} of {self.overall.num_questions} questions, counted as answered wrongly")
        return "\n".join(text) + "\n"


def options_of(question: str) -> dict[str, str]:
    """The lines "A. text", "(B) text", "C) text", "D: text" of a question: letter -> text."""
    return dict(OPTION_LINE.findall(question))


def likely_answer(response: str) -> str:
    """Where a tolerant reader looks: the last complete answer, else what follows the last <answer> or, without
    one, the last </think>, else everything; leftover tags removed."""
    answer = tagged_answer(response)
    if answer is None:
        tail = response.rpartition("</think>")[2]
        answer = tail.rpartition("<answer>")[2]
        answer = answer if answer.strip() else response
    return re.sub(r"</?(?:think|answer)>", " ", answer).strip()


def tolerant_option(text: str, sample: Sample) -> bool:
    """The letter stated as a whole; else the last capital letter mentioned on its own, one of the question's
    options if it lists any; else the text of exactly one option."""
    options = options_of(sample.question)
    got = read_option(text)
    if got is None:
        mentions = LETTER_MENTION.findall(unicodedata.normalize("NFKC", text))
        mentions = [letter for letter in mentions if letter in options or not options]
        named = [letter for letter, option in options.items() if contains_words(text, option)]
        got = mentions[-1] if mentions else named[0] if len(named) == 1 else None
    return got is not None and got == read_option(sample.answer)


def tolerant_number(text: str, sample: Sample) -> bool:
    """The number stated as a whole; else the last number mentioned."""
    mentions = NUMBER_MENTION.findall(unicodedata.normalize("NFKC", text))
    return same_number(text, sample.answer) or bool(mentions and same_number(mentions[-1], sample.answer))


def tolerant_text(text: str, sample: Sample) -> bool:
    """The truth occurs in the answer as whole words, in order."""
    return same_text(text, sample.answer) or contains_words(text, sample.answer)


def contains_words(text: str, words: str) -> bool:
    """Whether the normalised words occur in the normalised text, next to each other; false for no words."""
    needle = normalise_text(words)
    return bool(needle) and f" {needle} " in f" {normalise_text(text)} "


TOLERANT: dict[AnswerCheck, Callable[[str, Sample], bool]] = {
    same_option: tolerant_option,
    same_number: tolerant_number,
    same_text: tolerant_text,
}
"""The strict check of a sample -> its tolerant reader; whatever the check accepts, the reader accepts too."""


def strict_check(sample: Sample) -> AnswerCheck:
    """What the truth is compared as: an option, a number or a text."""
    check = answer_check(sample)
    return check_by_truth(sample.answer) if check is same_as_truth_reads else check


def choices_of(sample: Sample) -> str:
    """The letters of a multiple-choice question's options; "" for other questions, and when none of them is right."""
    letters = option_letters(sample.question) if strict_check(sample) is same_option else ""
    return letters if (read_option(sample.answer) or "none") in letters else ""


def score_response(response: str, sample: Sample, *, thinking: bool = True) -> ResponseScore:
    """Score one response to a prompt with data.thinking or without.

    strict: the <answer> tag is required, but of a prompt that does not ask for it (see final_answer), and its whole
    text must state the right answer. tolerant: see
    `likely_answer` and TOLERANT. Raises ValueError for a problem type that check_problem_types refuses.
    """
    check, answer = strict_check(sample), (tagged_answer if thinking else final_answer)(response)
    if check not in TOLERANT:
        raise ValueError(
            f"sample {sample.sample_id}: problem_type {sample.problem_type!r} has no tolerant reader; "
            f"add its check to TOLERANT in megalong/evaluate/score.py"
        )
    return ResponseScore(
        strict=answer is not None and check(answer, sample.answer),
        tolerant=TOLERANT[check](likely_answer(response), sample),
        well_formed=format_reward(response, sample) == 1.0,
    )


def choice_accuracy(samples: Sequence[Sample], chosen: Mapping[str, Sequence[str]]) -> ChoiceAccuracy | None:
    """chosen: sample id -> the letter chosen in each of its samples; without one, a question is answered wrongly.

    None when no question is multiple choice.
    """
    asked = {sample: letters for sample in samples if (letters := choices_of(sample))}
    if not asked:
        return None

    def share_right(sample: Sample) -> float:
        letters = chosen.get(sample.sample_id, ("",))
        return sum(letter == read_option(sample.answer) for letter in letters) / len(letters)

    return ChoiceAccuracy(
        num_questions=len(asked),
        accuracy=sum(map(share_right, asked)) / len(asked),
        chance=sum(1 / len(letters) for letters in asked.values()) / len(asked),
    )


def accuracy_row(
    questions: Sequence[Sequence[ResponseScore]], *, likelihood: ChoiceAccuracy | None = None
) -> AccuracyRow:
    """Means over at least one question, each with the same number of at least one scored response."""
    num_questions, num_samples = len(questions), len(questions[0])

    def mean(field: str) -> float:
        right = sum(getattr(score, field) for scores in questions for score in scores)
        return right / (num_questions * num_samples)

    def any_right(field: str) -> float:
        return sum(any(getattr(score, field) for score in scores) for scores in questions) / num_questions

    return AccuracyRow(
        num_questions=num_questions,
        strict=mean("strict"),
        tolerant=mean("tolerant"),
        strict_pass=any_right("strict"),
        tolerant_pass=any_right("tolerant"),
        likelihood=likelihood,
    )


def check_items(items: Sequence[tuple[Sample, Sequence[str]]]) -> None:
    """Raises ValueError for no items, a question given twice, or unequal numbers of responses."""
    if not items:
        raise ValueError("nothing to evaluate: no questions were given; check eval.manifest and dropped.jsonl")
    seen: set[str] = set()
    num_samples = len(items[0][1])
    for sample, responses in items:
        if sample.sample_id in seen:
            raise ValueError(f"sample {sample.sample_id} is evaluated twice; sample ids must be unique")
        seen.add(sample.sample_id)
        if not responses or len(responses) != num_samples:
            raise ValueError(
                f"sample {sample.sample_id} has {len(responses)} responses; expected "
                f"{max(num_samples, 1)} for every question (eval.num_samples)"
            )


def evaluate_responses(
    items: Sequence[tuple[Sample, Sequence[str]]], *, chosen: Mapping[str, Sequence[str]] | None = None,
    thinking: bool = True, unread: int = 0, weights: str = "",
) -> EvalReport:  # fmt: skip
    """items: each question of the benchmark once, with its n responses. Categories are compared casefolded.

    chosen: sample id -> the most likely option in each of its samples; None: not asked for (eval.likelihood=false).
    thinking: see score_response. unread: how many of the questions have empty responses because none was made.
    weights: see EvalReport. Raises ValueError for items that check_items or a problem type that score_response refuses.
    """
    check_items(items)
    by_category: dict[str, list[tuple[Sample, list[ResponseScore]]]] = {}
    for sample, responses in items:
        scores = [score_response(response, sample, thinking=thinking) for response in responses]
        by_category.setdefault(sample.category.strip().casefold(), []).append((sample, scores))

    def row(scored: Sequence[tuple[Sample, list[ResponseScore]]]) -> AccuracyRow:
        samples = [sample for sample, _ in scored]
        likelihood = None if chosen is None else choice_accuracy(samples, chosen)
        return accuracy_row([scores for _, scores in scored], likelihood=likelihood)

    everything = [pair for scored in by_category.values() for pair in scored]
    rank = {name: place for place, name in enumerate(BENCHMARK_CATEGORIES)}
    names = sorted(by_category, key=lambda name: (rank.get(name, len(rank)), name))
    num_responses = len(items) * len(items[0][1])
    return EvalReport(
        categories={name: row(by_category[name]) for name in names},
        overall=row(everything),
        num_samples=len(items[0][1]),
        format_rate=sum(score.well_formed for _, scores in everything for score in scores) / num_responses,
        mean_response_chars=sum(len(text) for _, responses in items for text in responses) / num_responses,
        unread=unread,
        weights=weights,
    )
