"""How the final answer, an option letter, a number and plain text are read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalong.rewards.extract import final_answer, normalise_text, read_number, read_option, tagged_answer


@pytest.mark.parametrize(
    ("response", "tagged", "final"),
    [
        ("<think>r</think><answer>B</answer>", "B", "B"),
        ("<think>r</think>\n<answer>\nthe red dog\n</answer>\n", "the red dog", "the red dog"),
        ("<answer>B</answer>", "B", "B"),
        ("r</think><answer>B</answer>", "B", "B"),  # the chat template wrote <think>
        # the last answer wins, and none counts before the end of the reasoning
        ("<think></think><answer>B</answer><answer>C</answer>", "C", "C"),
        ("<think><answer>B</answer></think><answer>C</answer>", "C", "C"),
        ("<think><answer>B</answer></think>", None, None),
        ("<think>r</think><answer>B</answer><think>s</think>", None, None),
        ("<think>a</think><answer>B</answer><think>b</think><answer>C</answer>", "C", "C"),
        ("<answer>B</answer><think>r</think>", None, None),
        # reasoning that never ends holds no answer
        ("<think>r <answer>B</answer>", None, None),
        ("<answer>B</answer><think>r", None, None),
        ("<think>r</think><answer>B</answer><think>", None, None),
        # nested and unpaired tags
        ("<answer><answer>B</answer></answer>", "B", "B"),
        ("<answer>A<answer>B</answer>C</answer>", "B", "B"),
        ("<answer>B</answer></answer>", "B", "B"),
        ("<answer>B</answer><answer>C", "B", "B"),
        ("</answer>B<answer>", None, None),
        ("<think>r</think><answer>B", None, None),
        ("<think>r</think>B", None, None),
        ("<answer>a </think> b</answer>", None, None),
        ("<answer></answer>", "", ""),
        # no tag at all: one line is the answer
        ("B", None, "B"),
        (" the red dog \n", None, "the red dog"),
        ("It barks.\nB", None, None),
        ("", None, ""),
        # tags are exact
        ("<Answer>B</Answer>", None, "<Answer>B</Answer>"),
        ("< answer>B</answer>", None, None),
    ],
)
def test_the_answer_is_the_last_complete_one_after_the_reasoning(response, tagged, final) -> None:
    assert tagged_answer(response) == tagged
    assert final_answer(response) == final


@given(
    hidden=st.text(alphabet="AB <>/answertik", max_size=40),
    answer=st.text(alphabet="ABCxyz 01.", max_size=20),
)
def test_nothing_inside_the_reasoning_changes_the_answer(hidden, answer) -> None:
    response = f"<think>{hidden}<answer>D</answer></think><answer>{answer}</answer>"
    assert final_answer(response) == answer.strip()


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        " B\n",
        "B.",
        "(B)",
        "(b)",
        "[B]",
        "B)",
        "B:",
        "B,",
        "B!",
        "**B**",
        "`B`",
        "'B'",
        '"B"',
        "_B_",
        "Ｂ",
        "Ⓑ",
    ]
    + ["B. foo", "B.foo", "B) foo", "(B) foo", "B: foo", "B - foo", "B\nfoo", "**B.** foo", "（Ｂ）"]
    + ["Option B", "option b.", "Option B foo", "Choice: B", "Answer: B", "The answer is B", "The answer is (B)."]
    + ["The correct answer is B. foo", "Therefore, the final answer is: B", "My best answer is option B"]
    + ["B. Vitamin C.", "B. U.S. army", "B. (see D)", "B. J. K. Rowling", "B. E. coli", "B. A to C. Then on"]
    + ["B. Team B beats team C. The crowd cheers.", "B. It shows red, so (C) is wrong."]
    + ["The answer is B because it barks", "B is correct", "Option B is the right one"],
)
def test_these_read_as_option_b(text) -> None:
    assert read_option(text) == "B"


@pytest.mark.parametrize(
    "text",
    ["", " ", "A dog", "a dog", "Apple", "The answer is a dog", "The answer is A dog", "answers", "A-frame", "I see"]
    + ["U.S. army", "a.m.", "A, B", "A and B", "A or B", "A/B", "A & B", "AB", "Option A and B", "(B", "2", "é", "Aé"]
    + [
        "A. B. C. D.",
        "(A) and (B)",
        "(A), (B)",
        "A) or B)",
        "A. red B. blue C. green",
        "B. blue\nC. green",
        "(A) red, (B) blue",
    ]
    + ["В", "\\boxed{B}", "none of them", "not B", "the answer"],  # the first is a Cyrillic letter
)
def test_these_read_as_no_option(text) -> None:
    assert read_option(text) is None


def test_the_article_is_told_from_option_a_by_what_follows() -> None:
    assert [read_option(text) for text in ("A", "a", "A.", "A. dog", "(A) dog", "Option A dog")] == ["A"] * 6
    assert read_option("A dog") is None


@pytest.mark.parametrize(
    ("text", "value", "decimals", "unit"),
    [
        ("3.5", 3.5, 1, ""),
        ("3", 3.0, 0, ""),
        ("3.", 3.0, 0, ""),
        ("3.50", 3.5, 2, ""),
        (".5", 0.5, 1, ""),
        ("1,000", 1000.0, 0, ""),
        ("1,000,000.25", 1000000.25, 2, ""),
        ("-2", -2.0, 0, ""),
        ("−2", -2.0, 0, ""),
        ("+2", 2.0, 0, ""),
        ("-$3", -3.0, 0, ""),
        ("50%", 50.0, 0, "%"),
        ("50 percent", 50.0, 0, "percent"),
        ("1/2", 0.5, 0, ""),
        ("½", 0.5, 0, ""),
        ("1e3", 1000.0, 0, ""),
        ("５", 5.0, 0, ""),
        ("**3**", 3.0, 0, ""),
        ("7th", 7.0, 0, "th"),
        ("3 people", 3.0, 0, "people"),
        ("about 3 people.", 3.0, 0, "people"),
        ("3.5 km/h", 3.5, 1, "km/h"),
        ("3 m²", 3.0, 0, "m2"),
        ("2 million", 2e6, 0, ""),
        ("One hundred", 100.0, 0, ""),
        ("zero", 0.0, 0, ""),
        ("Three", 3.0, 0, ""),
        ("twelve dogs", 12.0, 0, "dogs"),
        ("twenty-one", 21.0, 0, ""),
        ("ninety nine", 99.0, 0, ""),
        ("3½", 3.5, 0, ""),
        ("-3 1/2 km", -3.5, 0, "km"),
        ("two dozen eggs", 24.0, 0, "eggs"),
        ("3 trillion", 3e12, 0, ""),
        ("2 quarters", 2.0, 0, "quarters"),
    ],
)
def test_one_number_is_read_with_its_precision(text, value, decimals, unit) -> None:
    number = read_number(text)
    assert (number.value, number.decimals, number.unit) == (value, decimals, unit)


@pytest.mark.parametrize(
    "text",
    ["", "B", "three or four", "3 or 4", "10-20", "5:30", "1,00", "1 000", "1e999", "9" * 400, "1/0", "threefold"]
    + ["3 hours and 20 minutes", "2 hundred fifty", "there are 3", "nan", "inf", "1/" + "9" * 400]
    + ["10²", "10⁻²", "three and a half", "two thirds", "one fifth"],
)
def test_not_one_number(text) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The red dog.", "red dog"),
        ("the  RED\ndog", "red dog"),
        ("two dogs", "2 dogs"),
        ("A dog's bone", "dogs bone"),
        ("x-ray – foo; (bar)", "x ray foo bar"),
        ("3.50 m, -2 and 1,000", "3.50 m -2 and 1000"),
        ("Straße ＡＢＣ ﬁre", "strasse abc fire"),
        ("t'wo a\0b --1", "2 a\0b -1"),
        ("the", ""),
        ("", ""),
    ],
)
def test_text_is_normalised_word_by_word(text, want) -> None:
    assert normalise_text(text) == want


def test_vowel_signs_are_part_of_a_word() -> None:
    assert normalise_text("कि") != normalise_text("का")


@given(st.text(max_size=60))
def test_normalising_twice_changes_nothing_and_no_reader_raises(text) -> None:
    assert normalise_text(normalise_text(text)) == normalise_text(text)
    assert read_option(text) is None or read_option(text).isalpha()
    assert read_number(text) is None or abs(read_number(text).value) < float("inf")
