"""Benchmark scores: values by hand, strict and tolerant."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalong.evaluate.score import (
    TOLERANT,
    choices_of,
    evaluate_responses,
    likely_answer,
    options_of,
    score_response,
)
from megalong.records import Sample
from megalong.rewards.functions import ACCURACY_BY_TYPE, same_as_truth_reads

QUESTION = "Which animal is it?\nA. a cat\nB. a dog\nC. a red\tbird\nD. none"


def a_sample(
    sample_id: str = "q1",
    answer: str = "B",
    category: str = "plot",
    problem_type: str = "multiple choice",
    question: str = QUESTION,
) -> Sample:
    return Sample(
        sample_id=sample_id,
        question=question,
        answer=answer,
        videos=(),
        problem_type=problem_type,
        category=category,
        reasoning="",
        subtitles="",
    )


def said(answer: str) -> str:
    return f"<think>r</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("response", "strict", "tolerant"),
    [
        (said("B"), True, True),
        (said("B. a dog"), True, True),
        ("<answer>B</answer>", True, True),
        ("B", False, True),
        ("It barks, so B", False, True),
        ("It is not A. I think it must be B", False, True),
        ("It could be B, but A is right.", False, False),
        ("I saw a dog.", False, True),  # the text of exactly one option
        ("A dog and a cat", False, False),
        ("a cat", False, False),
        (said("a dog"), False, True),
        (said("It is B, surely"), False, True),
        ("<think>r</think>B", False, True),
        ("<think>r</think><answer>B", False, True),
        ("<think>A or C?</think>\n<answer> B", False, True),
        ("<think>C</think><answer></answer>", False, False),
        ("<think>it is B", False, True),
        ("<think>B</think><answer>A</answer>", False, False),
        ("See Vitamin E: B, or Z", False, True),  # only listed options are mentions
        ("A U.S. flag, D-Day, C++", False, False),
        ("", False, False),
    ],
)
def test_multiple_choice(response, strict, tolerant) -> None:
    score = score_response(response, a_sample())
    assert (score.strict, score.tolerant) == (strict, tolerant)


@pytest.mark.parametrize(
    ("response", "answer", "problem_type", "strict", "tolerant"),
    [
        (said("3.5"), "3.5", "numerical", True, True),
        ("There are 2, no, 3.5 of them", "3.5", "numerical", False, True),
        ("First 3.5 and then 2", "3.5", "numerical", False, False),
        (said("three"), "3", "general", True, True),
        ("I count 1,000.", "1000", "general", False, True),
        ("no idea", "3", "numerical", False, False),
        (said("the red car"), "Red car", "open-ended", True, True),
        (said("He takes the red car home."), "red car", "open-ended", False, True),
        (said("a redcar"), "red car", "general", False, False),
        (said("anything"), "the", "open-ended", False, False),
    ],
)
def test_other_types(response, answer, problem_type, strict, tolerant) -> None:
    score = score_response(response, a_sample(answer=answer, problem_type=problem_type))
    assert (score.strict, score.tolerant) == (strict, tolerant)


@pytest.mark.parametrize(
    ("response", "strict"), [("B", True), ("C", False), (said("B"), True), ("it is\nB", False), ("<think>B", False)]
)
def test_a_prompt_that_asks_for_no_tags_is_answered_without_them(response, strict) -> None:
    assert score_response(response, a_sample(), thinking=False).strict is strict
    report = evaluate_responses([(a_sample(), [response])], thinking=False)
    assert report.overall.strict == strict


def test_letters_count_as_mentions_when_the_question_lists_no_options() -> None:
    sample = a_sample(question="Which one?")
    assert score_response("surely B", sample).tolerant
    assert not score_response("surely B or E", sample).tolerant
    assert options_of(QUESTION) == {"A": "a cat", "B": "a dog", "C": "a red\tbird", "D": "none"}
    assert options_of("Q\n(A) x\n B) y \nC: z") == {"A": "x", "B": "y", "C": "z"}


@pytest.mark.parametrize(
    ("response", "want"),
    [
        (said(" B "), "B"),
        ("<think>r</think> so B", "so B"),
        ("<think>r</think>x<answer>B", "B"),
        ("<think>r B", "r B"),
        ("<think>r</think>", "r"),
        ("plain", "plain"),
    ],
)
def test_where_a_tolerant_reader_looks(response, want) -> None:
    assert likely_answer(response) == want


def test_every_check_has_a_tolerant_reader() -> None:
    assert set(ACCURACY_BY_TYPE.values()) - {same_as_truth_reads} == set(TOLERANT)


def test_a_check_without_a_tolerant_reader_is_named(monkeypatch) -> None:
    monkeypatch.setitem(ACCURACY_BY_TYPE, "essay", lambda answer, truth: True)
    with pytest.raises(ValueError, match="'essay' has no tolerant reader"):
        score_response("B", a_sample(problem_type="essay"))


@given(
    answer=st.text(max_size=30) | st.sampled_from(["B", "(b)", "3", "three", "red car", "The Red Car."]),
    truth=st.sampled_from([("B", "multiple choice"), ("3", "numerical"), ("red car", "open-ended"), ("b.", "general")]),
)
def test_what_is_strictly_right_is_tolerantly_right(answer, truth) -> None:
    score = score_response(said(answer), a_sample(answer=truth[0], problem_type=truth[1]))
    assert score.tolerant or not score.strict


ITEMS = [
    (a_sample("s1", category="Spatial"), [said("B"), said("A")]),  # strict 1/2, tolerant 1/2
    (a_sample("t1", category="temporal"), ["so B", "so B"]),  # 0, 1
    (a_sample("t2", category="Temporal"), [said("B"), said("B")]),  # 1, 1
    (a_sample("x1", category="audio"), ["", ""]),  # 0, 0
    (a_sample("p1", category="plot"), [said("C"), "I saw a dog"]),  # 0, 1/2
]


def test_report_of_two_samples_per_question() -> None:
    report = evaluate_responses(ITEMS)
    assert list(report.categories) == ["temporal", "plot", "spatial", "audio"]
    got = {
        name: (row.num_questions, row.strict, row.tolerant, row.strict_pass, row.tolerant_pass)
        for name, row in [*report.categories.items(), ("overall", report.overall)]
    }
    assert got == {
        "temporal": (2, 0.5, 1.0, 0.5, 1.0),
        "plot": (1, 0.0, 0.5, 0.0, 1.0),
        "spatial": (1, 0.5, 0.5, 1.0, 1.0),
        "audio": (1, 0.0, 0.0, 0.0, 0.0),
        "overall": (5, 0.3, 0.6, 0.4, 0.8),  # over questions: temporal counts twice
    }
    assert report.num_samples == 2
    assert report.format_rate == 0.5
    assert report.mean_response_chars == (5 * len(said("B")) + 4 + 4 + 0 + 0 + 11) / 10


def test_json_holds_every_field() -> None:
    loaded = json.loads(evaluate_responses(ITEMS).to_json())
    assert loaded["overall"] == {
        "num_questions": 5,
        "strict": 0.3,
        "tolerant": 0.6,
        "strict_pass": 0.4,
        "tolerant_pass": 0.8,
        "likelihood": None,
    }
    assert list(loaded["categories"]) == ["temporal", "plot", "spatial", "audio"]
    assert (loaded["num_samples"], loaded["format_rate"], loaded["unread"]) == (2, 0.5, 0)


def test_table_has_the_papers_columns() -> None:
    lines = evaluate_responses(ITEMS).to_table().splitlines()
    assert lines[:6] == [
        "Accuracy (%)     Temporal   Plot  Spatial  Audio  Overall",
        "strict               50.0    0.0     50.0    0.0     30.0",
        "tolerant            100.0   50.0     50.0    0.0     60.0",
        "strict pass@2        50.0    0.0    100.0    0.0     40.0",
        "tolerant pass@2     100.0  100.0    100.0    0.0     80.0",
        "questions               2      1        1      1        5",
    ]


def test_questions_without_a_response_are_said_below_the_table() -> None:
    report = evaluate_responses([(a_sample(), [said("B")]), (a_sample(sample_id="lost"), [""])], unread=1)
    assert json.loads(report.to_json())["unread"] == 1
    assert report.to_table().splitlines()[-1] == "unread: 1 of 2 questions, counted as answered wrongly"
    assert "unread" not in evaluate_responses(ITEMS).to_table()


def test_one_sample_per_question_shows_no_pass_at_n() -> None:
    table = evaluate_responses([(a_sample(category=name, sample_id=name), [said("B")]) for name in "ab"]).to_table()
    assert "pass@" not in table
    assert table.splitlines()[-1] == ("samples per question: 1   well-formed: 100.0%   mean response: 34 characters")


@pytest.mark.parametrize(
    ("sample", "letters"),
    [
        (a_sample(), "ABCD"),
        (a_sample(question="Which? (A) left (B) right", problem_type="general"), "AB"),
        (a_sample(question="Which?"), ""),  # no options to choose from
        (a_sample(answer="E"), ""),  # none of them is right
        (a_sample(question="Which?", problem_type="general"), ""),
        (a_sample(answer="3", problem_type="general"), ""),
        (a_sample(answer="a dog", problem_type="open-ended"), ""),
    ],
)
def test_the_options_of_a_question(sample, letters) -> None:
    assert choices_of(sample) == letters


def test_likelihood_counts_multiple_choice_questions_alone() -> None:
    two = "Left or right?\nA. left\nB. right"
    items = [
        (a_sample("p1"), ["", ""]),  # four options
        (a_sample("p2", question=two), ["", ""]),
        (a_sample("p3", answer="red", problem_type="open-ended"), ["", ""]),
        (a_sample("g1", category="goal", question=two, answer="A"), ["", ""]),  # its video was unreadable
        (a_sample("s1", category="spatial", answer="3", problem_type="numerical"), ["", ""]),
    ]
    chosen = {"p1": ("B", "C"), "p2": ("B", "B")}
    report = evaluate_responses(items, chosen=chosen)
    got = {
        name: row.likelihood and (row.likelihood.num_questions, row.likelihood.accuracy, row.likelihood.chance)
        for name, row in [*report.categories.items(), ("overall", report.overall)]
    }
    assert got == {
        "goal": (1, 0.0, 0.5),
        "plot": (2, 0.75, 0.375),
        "spatial": None,
        "overall": (3, 0.5, pytest.approx(1.25 / 3)),
    }
    assert json.loads(report.to_json())["categories"]["plot"]["likelihood"] == {
        "num_questions": 2,
        "accuracy": 0.75,
        "chance": 0.375,
    }
    assert report.to_table().splitlines()[6:9] == [
        "likelihood        0.0  75.0        -     50.0",
        "  by chance      50.0  37.5        -     41.7",
        "  questions         1     2        0        3",
    ]
    assert evaluate_responses(items).overall.likelihood is None


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no questions were given"),
        ([(a_sample("q1"), ["B"]), (a_sample("q1"), ["B"])], "sample q1 is evaluated twice"),
        ([(a_sample("q1"), ["B"]), (a_sample("q2"), ["B", "B"])], "sample q2 has 2 responses; expected 1"),
        ([(a_sample("q1"), [])], "sample q1 has 0 responses; expected 1"),
        ([(a_sample(problem_type="essay"), ["B"])], "'essay' is unknown"),
    ],
)
def test_items_that_would_give_a_wrong_mean_are_refused(items, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_responses(items)
