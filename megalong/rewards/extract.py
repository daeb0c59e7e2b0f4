"""Read the final answer out of a response: tags first, then an option letter, a number or plain text.

What decides, for every reward and for evaluation alike:
    * The answer comes after all reasoning: only text after the last `</think>` counts. A response that ends
      inside a `<think>` it never closed has no answer, whatever it wrote there.
    * The last complete `<answer>..</answer>` wins; of nested tags the innermost. An `<answer>` that is never
      closed is no answer.
    * Without any of the four tags the response itself is the answer if it is a single line (the prompt of
      `data.thinking=false` asks for no tags). A response with some tags but no complete answer has none.
    * Tags are matched exactly, in lower case and without spaces inside.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORD_VALUE = {word: value for value, word in enumerate(UNITS + TEENS)}
WORD_VALUE |= {word: 10 * value for value, word in enumerate(TENS, start=2)}
SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
SCALES |= {"dozen": 12.0, "dozens": 12.0}

NUMBER_WORD = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(TENS)})(?:[-\s](?P<after>{'|'.join(UNITS[1:])}))?"
    rf"|(?P<small>{'|'.join(TEENS + UNITS)}))\b"
)
NUMBER = re.compile(
    r"(?:(?:about|approximately|around|roughly|exactly)\s+|[~≈=]\s*)?"
    r"(?P<sign>[+-])?[$€£¥]?\s*(?:(?P<integer>[0-9]+)\s+(?=[0-9]+\s*/))?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.(?P<decimals>[0-9]+))?"
    r"(?P<exponent>e[+-]?[0-9]{1,4})?(?:\s*/\s*(?P<denominator>[0-9]+))?"
    rf"(?:\s*(?P<scale>{'|'.join(SCALES)})\b)?\s*"
    r"(?P<unit>(?!and\b|(?:thir|four|fif|six|seven|eigh|nin|ten)(?:d|th)s?\b)"  # "and a half", "thirds"
    r"(?:%|[a-zμ°]+[23]?)(?:[\s/·*-]+[a-z%]+[23]?){0,3})?\s*[.!]?",
)
OPTION = re.compile(
    r"(?P<lead>(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|my)\s+)?(?:(?:best|correct|right|final)\s+)*"
    r"(?:answer|option|choice)\b(?:\s+(?:is|would\s+be))?\s*[:=]?\s*(?:(?:option|choice|letter)\s+)?)?"
    r"(?P<open>[(\[])?(?P<letter>[A-Z])(?P<tail>(?![^\W_]).*)",
    re.IGNORECASE | re.DOTALL,
)
OPTION_LEAD = re.compile(r"(?:option|choice|letter)\s+$", re.IGNORECASE)
# "U.S." and "a.m." are abbreviations, not options U and A.
OPTION_DELIMITER = re.compile(r"\s*[.:)\]](?![A-Za-z]\.)|\s+[-–—]\s|[ \t]*\n|[;,!?]+\s*$")
# "A. B. C. D." and "A) or B)": options and nothing else; not "B. J. K. Rowling".
MORE_OPTIONS = re.compile(r"(?:\s*(?:[,/&;]|and\b|or\b)?\s*[(\[]?[A-Z][.):\]]+)+\s*")
OPTION_REASON = re.compile(r",?\s+(?:because|since|as|for)\b", re.IGNORECASE)
OPTION_VERDICT = re.compile(r"\s+is\s+(?:the\s+)?(?:correct|right|best|final|answer)\b", re.IGNORECASE)
NUMBER_MARK = re.compile(r"[0-9]\.[0-9]|\W-[0-9]", re.DOTALL)
HEDGE = re.compile(r"\s*(?:,|/|&|\band\b|\bor\b)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A number as it was written: how exactly it was stated decides how exactly it is compared."""

    value: float
    decimals: int  # digits after the point; 0 for integers, fractions and exponents
    unit: str  # "%" or up to four unit words, casefolded; "" when none


def tagged_answer(response: str) -> str | None:
    """The stripped text of the last complete <answer> after all reasoning; None when there is none."""
    tail = response.rpartition("</think>")[2]
    if "<think>" in tail:
        return None
    start = tail.rfind("<answer>", 0, max(tail.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    return tail[start : tail.find("</answer>", start)].strip()


def final_answer(response: str) -> str | None:
    """The tagged answer; of a response without any tag, its one line; else None."""
    if any(tag in response for tag in TAGS):
        return tagged_answer(response)
    text = response.strip()
    return None if "\n" in text else text


def read_option(text: str) -> str | None:
    """The option letter, upper case, that `text` as a whole states; None when it states none.

    Read as B: "B", "b", "B.", "(B)", "[b]", "B. foo", "B.foo", "B) foo", "B: foo", "B - foo", "**B**",
    "Ｂ", "Option B", "Answer: B", "The answer is (B).", "The answer is B because ..", "B is correct".
    Not an option: an article or a word ("A dog", "Apple", "The answer is a dog"), an abbreviation ("U.S."),
    two options at once ("A, B", "A and B", "A/B", "A. B.", "(A) or (B)"), a list of them ("A. red B. blue").
    """
    text = re.sub(r"[*`\"“”]", "", unicodedata.normalize("NFKC", text))
    # Long runs of white space would make the pattern's optional parts slow.
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip(" \n'_$")
    match = OPTION.fullmatch(text)
    if match is None:
        return None
    lead, tail = match["lead"] or "", match["tail"]
    closed = match["open"] is None or tail[:1] in (")", "]")
    delimiter = OPTION_DELIMITER.match(tail)
    if delimiter and (MORE_OPTIONS.fullmatch(tail, delimiter.end()) or _is_list(match, delimiter)):
        return None
    names_option = bool(OPTION_LEAD.search(lead)) and tail[:1].isspace() and not HEDGE.match(tail)
    reads = not tail or delimiter or OPTION_VERDICT.match(tail) or names_option or (lead and OPTION_REASON.match(tail))
    return match["letter"].upper() if closed and reads else None


def _is_list(option: re.Match[str], delimiter: re.Match[str]) -> bool:
    """Whether the next option follows in the same form on a line or after a comma of its own, or the next two do."""
    letter, tail = ord(option["letter"].upper()), option["tail"]
    opens, closes = re.escape(option["open"] or ""), re.escape(delimiter[0].strip())
    first, second = (rf"{opens}{re.escape(chr(letter + step))}{closes}\s+\S" for step in (1, 2))
    return bool(re.search(rf"(?:\n|[,;] ){first}|\s{first}.*\s{second}", tail, re.DOTALL))


def digits_for_words(text: str) -> str:
    """Write the English numbers zero to ninety-nine of casefolded `text` as digits."""

    def digits(match: re.Match[str]) -> str:
        return str(sum(WORD_VALUE[word] for word in match.groups() if word))

    return NUMBER_WORD.sub(digits, text)


def read_number(text: str) -> Number | None:
    """The one number that `text` as a whole states; None when it states none or more than one.

    Read: "3.5", "1,000", "-2", "50%" (value 50), "$3", "1/2", "3 1/2", "3½", "1e3", "three", "twenty-one", "2 million",
    "two dozen", "about 3 people", "7th". Not a number: "3 or 4", "10-20", "5:30", "1,00", "10²", "three and a half",
    "two thirds", anything not finite.
    """
    if re.search(r"[0-9][²³¹⁰⁴-⁹]", text):  # a power, which NFKC makes more digits
        return None
    text = re.sub(r"(?<=[0-9])(?=[¼-¾⅐-⅞])", " ", text)
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().strip(" \t\r\n*_`'\"").split())
    text = digits_for_words(text)
    match = NUMBER.fullmatch(text.replace("−", "-").replace("⁄", "/"))
    if match is None:
        return None
    decimals, denominator = match["decimals"] or "", float(match["denominator"] or 1)
    if not 0 < denominator < math.inf:
        return None
    whole = match["whole"].replace(",", "") or "0"
    value = float(f"{match['sign'] or ''}{whole}.{decimals or 0}{match['exponent'] or ''}")
    integer = float(f"{match['sign'] or ''}{match['integer'] or 0}")  # before a fraction
    value = (integer + value / denominator) * SCALES.get(match["scale"], 1.0)
    if not math.isfinite(value):
        return None
    plain = not (match["exponent"] or match["denominator"] or match["scale"])
    return Number(value=value, decimals=len(decimals) if plain else 0, unit=match["unit"] or "")


def normalise_text(text: str) -> str:
    """Casefolded NFKC text without punctuation and English articles, small numbers as digits, single spaces.

    A point between digits and a minus before a digit stay; commas between thousands go.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("−", "-")
    text = digits_for_words(re.sub(r"(?<=\w)['’](?=\w)", "", text))
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    padded = f" {text} "
    kept = (
        " " if unicodedata.category(mark)[0] == "P" and not NUMBER_MARK.fullmatch(before + mark + after) else mark
        for before, mark, after in zip(padded, padded[1:], padded[2:], strict=False)
    )
    return " ".join(word for word in "".join(kept).split() if word not in ("a", "an", "the"))
