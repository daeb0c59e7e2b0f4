"""What a response earns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalong.records import Sample
from megalong.rewards.functions import ACCURACY_BY_TYPE, REWARDS, accuracy, check_problem_types, format_reward


def a_sample(answer: str = "B", problem_type: str = "multiple choice", sample_id: str = "q1") -> Sample:
    return Sample(
        sample_id=sample_id,
        question="Which animal is it?\nA. a cat\nB. a dog",
        answer=answer,
        videos=(),
        problem_type=problem_type,
        category="plot",
        reasoning="",
        subtitles="",
    )


def said(answer: str) -> str:
    return f"<think>I watched it.</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("response", "want_accuracy", "want_format"),
    [
        (said("B"), 1, 1),
        ("<think>r</think>\n \n<answer>B</answer>", 1, 1),
        ("<think>\nr\n</think><answer>\nB\n</answer>", 1, 1),
        ("<think></think><answer>B</answer>", 1, 1),
        (said("A"), 0, 1),
        (said("b"), 1, 1),
        (said("B."), 1, 1),
        (said("(B)"), 1, 1),
        (said("B. a dog"), 1, 1),
        (said("Ｂ"), 1, 1),
        (said("The answer is B"), 1, 1),
        (said("A dog"), 0, 1),
        (said("3.5"), 0, 1),
        (said(""), 0, 1),
        # white space and words around
        (said("B") + "\n", 1, 0),
        (" " + said("B"), 1, 0),
        ("<think>r</think> so <answer>B</answer>", 1, 0),
        (said("B") + " Done.", 1, 0),
        # missing tags
        ("B", 1, 0),
        ("I think it is B", 0, 0),
        ("Some reasoning.\nB", 0, 0),
        ("<answer>B</answer>", 1, 0),
        ("r</think><answer>B</answer>", 1, 0),
        ("<think>r<answer>B</answer>", 0, 0),
        ("<think>r</think>B", 0, 0),
        ("<think>r</think><answer>B", 0, 0),
        ("", 0, 0),
        # tag order
        ("<answer>B</answer><think>r</think>", 0, 0),
        ("</think>r<think><answer>B</answer>", 0, 0),
        ("<think><answer>r</think>B</answer>", 0, 0),
        # nested and repeated tags
        ("<think>r</think><answer><answer>B</answer></answer>", 1, 0),
        ("<think><think>r</think></think><answer>B</answer>", 1, 0),
        ("<think></think><answer>B</answer><answer>C</answer>", 0, 0),
        ("<think></think><answer>C</answer><answer>B</answer>", 1, 0),
        ("<think>a</think><think>b</think><answer>B</answer>", 1, 0),
        # hack attempts: an answer planted in the reasoning, every option at once
        ("<think><answer>B</answer></think><answer>A</answer>", 0, 0),
        ("<think><answer>B</answer></think>", 0, 0),
        (said("A, B, C, D"), 0, 1),
        (said("A or B"), 0, 1),
        (said("A. B. C. D."), 0, 1),
        ("<answer>A</answer><answer>B</answer>" * 3 + "<answer>C</answer>", 0, 0),
    ],
)
def test_table_of_multiple_choice_responses(response, want_accuracy, want_format) -> None:
    assert accuracy(response, a_sample("B")) == want_accuracy
    assert format_reward(response, a_sample("B")) == want_format


@pytest.mark.parametrize(
    ("answer", "truth", "problem_type", "want"),
    [
        ("3.5", "3.5", "numerical", 1),
        ("3", "3.5", "numerical", 0),
        ("3.54", "3.5", "numerical", 1),
        ("3.56", "3.5", "numerical", 0),
        ("3.1416", "3.14", "numerical", 1),
        ("0.125", "0.13", "numerical", 1),
        ("3.0", "3", "numerical", 1),
        ("3.2", "3", "numerical", 0),
        ("2024", "2023", "numerical", 0),
        ("1,000", "1000", "numerical", 1),
        ("2", "-2", "numerical", 0),
        ("50%", "50", "numerical", 1),
        ("0.5", "50%", "numerical", 0),
        ("three people", "3", "numerical", 1),
        ("0", "0", "numerical", 1),
        ("0.0001", "0", "numerical", 0),
        ("3 or 4", "3", "numerical", 0),
        ("The Dog.", "dog", "open-ended", 1),
        ("redcar", "red car", "open-ended", 0),  # spaces separate words
        ("the red car", "red car", "free-form", 1),
        ("two dogs", "2 dogs", "free-form", 1),
        ("3.5 metres", "3.5 metres.", "open-ended", 1),
        ("3 metres", "3.5 metres", "open-ended", 0),
        ("Café", "cafe\u0301", "open-ended", 1),
        ("the cat and the dog", "dog", "open-ended", 0),
        ("the", "the", "open-ended", 1),
        ("an", "the", "open-ended", 0),
        # "general": the truth decides
        ("B. a dog", "B", "general", 1),
        ("(b)", "B.", "general", 1),
        ("A", "B", "general", 0),
        ("three", "3", "general", 1),
        ("3 cats", "3 dogs", "general", 0),
        ("three dogs", "3 dogs", "general", 1),
        ("a red car", "The red car.", "General", 1),
        ("B", "b", "Multiple_Choice", 1),
    ],
)
def test_table_of_answers_by_problem_type(answer, truth, problem_type, want) -> None:
    assert accuracy(said(answer), a_sample(truth, problem_type)) == want
    check_problem_types([a_sample(truth, problem_type)])


@pytest.mark.parametrize("name", sorted(REWARDS))
@given(response=st.text(max_size=50) | st.text(alphabet="<>/thinkanswer AB3.\n", max_size=80), data=st.data())
def test_every_reward_is_deterministic_and_within_0_and_1_for_any_string(name, response, data) -> None:
    sample = a_sample(*data.draw(st.sampled_from([("B", "multiple choice"), ("3.5", "number"), ("dog", "general")])))
    for text in (response, said(response)):
        first = REWARDS[name](text, sample)
        assert isinstance(first, float)
        assert 0.0 <= first <= 1.0
        assert REWARDS[name](text, sample) == first


@pytest.mark.parametrize("problem_type", sorted(ACCURACY_BY_TYPE))
@pytest.mark.parametrize("truth", ["B", "3"])
def test_every_problem_type_gives_1_for_its_truth_and_0_for_another(problem_type, truth) -> None:
    if ACCURACY_BY_TYPE[problem_type](truth, truth):
        assert accuracy(said(truth), a_sample(truth, problem_type)) == 1.0
    assert accuracy(said("zebra crossing"), a_sample(truth, problem_type)) == 0.0


def test_an_unknown_problem_type_is_named_with_its_sample_and_the_known_types() -> None:
    samples = [a_sample(), a_sample(problem_type="essay", sample_id="q7")]
    with pytest.raises(ValueError, match=r"sample q7: problem_type 'essay' is unknown.*multiple choice.*general"):
        check_problem_types(samples)
    with pytest.raises(ValueError, match="essay"):
        accuracy("B", samples[1])


@pytest.mark.parametrize(
    ("answer", "problem_type"),
    [("a dog", "multiple choice"), ("many", "numerical"), ("", "open-ended"), ("", "general")],
)
def test_a_truth_that_no_response_can_match_is_refused(answer, problem_type) -> None:
    with pytest.raises(ValueError, match=r"sample q1: answer .* correct the answer or the problem_type"):
        check_problem_types([a_sample(answer, problem_type)])
