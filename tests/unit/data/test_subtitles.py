import re

import pytest

from megalong.data.subtitles import parse_subtitles

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello <i>there</i>,
general.

2
00:01:05,040 --> 00:01:06,000 X1:40 X2:600
{\\an8}- <font color="#fff">Kenobi</font> &amp; co.

3
00:01:07,000 --> 00:01:08,000


4
01:15:03,999 --> 01:15:05,000
3 < 4 and 5 > 4
"""

VTT = """WEBVTT - a title
Kind: captions

STYLE
::cue { color: red }

NOTE
not speech

intro
00:01.000 --> 00:04.000 align:start position:0%
<v Roger>Hi <00:00:02.000><c.yellow>you</c></v>

101:00:00.000 --> 101:00:01.000
late
"""


def test_srt():
    expected = "[00:01] Hello there, general.\n[01:05] - Kenobi & co.\n[75:03] 3 < 4 and 5 > 4"
    assert parse_subtitles(SRT) == expected
    assert parse_subtitles(SRT.replace("\n", "\r\n")) == expected


def test_vtt():
    assert parse_subtitles(VTT) == "[00:01] Hi you\n[6060:00] late"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "1\n00:00:01,000 --> 00:00:02,000\nHello\n2\n00:00:03,000 --> 00:00:04,000\nWorld\n",
            "[00:01] Hello\n[00:03] World",
        ),
        (
            "1\n00:00:01,000 --> 00:00:02,000\nIn\n1999\n\n00:00:03,000 --> 00:00:04,000\nWorld\n",
            "[00:01] In 1999\n[00:03] World",
        ),
        (
            "WEBVTT\n\n00:01.000 --> 00:02.000\nIn\n1999\n00:03.000 --> 00:04.000\nWorld\n",
            "[00:01] In 1999\n[00:03] World",
        ),
    ],
)
def test_a_timing_line_begins_a_cue_without_an_empty_line_before_it(text, expected):
    assert parse_subtitles(text) == expected


def test_a_line_of_white_space_ends_a_cue_in_srt_and_not_in_vtt():
    cue = "00:00:01.000 --> 00:00:02.000\n \nhello<00:00:01.500><c> and</c>\n\nnot speech\n"
    assert parse_subtitles(f"WEBVTT\n\n{cue}") == "[00:01] hello and"
    assert parse_subtitles(f"1\n{cue}") == ""


def test_cues_without_text_are_no_lines():
    assert parse_subtitles("1\n00:00:01,000 --> 00:00:02,000\n \n") == ""


@pytest.mark.parametrize("text", ["", "WEBVTT\n", "just some text\n\nand more"])
def test_text_without_cues_is_refused(text):
    with pytest.raises(ValueError, match="no cue found"):
        parse_subtitles(text)


ROLLING = """WEBVTT
Kind: captions

00:00:00.160 --> 00:00:02.550 align:start position:0%
 
hello<00:00:00.400><c> everyone</c>

00:00:02.550 --> 00:00:02.560 align:start position:0%
hello everyone
 

00:00:02.560 --> 00:00:04.000 align:start position:0%
hello everyone
and<00:00:03.000><c> welcome</c>

00:00:04.000 --> 00:00:04.010 align:start position:0%
and welcome
 

00:00:04.010 --> 00:00:06.000 align:start position:0%
and welcome
back<00:00:05.000><c> back</c>
"""


def test_lines_that_stay_on_the_screen_are_said_once():
    """As YouTube's automatic captions roll: each cue shows the line before, and one shows it alone for 10 ms."""
    expected = "[00:00] hello everyone\n[00:02] and welcome\n[00:04] back back"
    assert parse_subtitles(ROLLING) == expected
    # Converted to SubRip the words have no times any more.
    cues = re.sub(r"<[^>]*>| align.*", "", ROLLING.partition("\n\n")[2]).replace("\n \n", "\n").split("\n\n")
    srt = "\n\n".join(f"{number}\n{cue.strip()}" for number, cue in enumerate(cues, start=1)).replace(".", ",")
    assert parse_subtitles(srt) == expected


@pytest.mark.parametrize(
    ("cues", "expected"),
    [
        ("00:01.000 --> 00:02.000\nNo.\n\n00:02.040 --> 00:03.000\nNo.\n", "[00:01] No.\n[00:02] No."),
        ("00:01.000 --> 00:02.000\nA\nB\n\n00:02.000 --> 00:03.000\nA\nC\n", "[00:01] A B\n[00:02] A C"),
        ("10:00.000 --> 10:04.000\nA\n\n00:01.000 --> 00:02.000\nA\n", "[10:00] A\n[00:01] A"),
        ("00:01.000 --> 00:02.000\nB\nA\n\n00:01.500 --> 00:03.000\nA\nA\n", "[00:01] B A\n[00:01] A"),
        ("00:01.5 --> 00:02.5\nA\n\n00:02.500 --> 00:03.000\nA\nB\n", "[00:01] A\n[00:02] B"),
        ("00:01.000 -->\nA\n\n00:02.000 --> 00:03.000\nA\n", "[00:01] A\n[00:02] A"),
    ],
    ids=["after a gap", "not the line that stays", "another track", "while it stays", "one digit", "no end"],
)
def test_of_captions_that_roll_only_what_stays_is_left_out(cues, expected):
    assert parse_subtitles(f"WEBVTT\n\n{cues}\n59:00.000 --> 59:00.010\n\n") == expected


@pytest.mark.parametrize("header", ["", "WEBVTT\n\n"])
def test_subtitles_that_do_not_roll_lose_nothing(header):
    cues = ("1.000 --> 00:02.000\nNo.", "2.000 --> 00:03.000\nNo.", "3.000 --> 00:04.000\nNo.\nYes.")
    text = header + "\n\n".join(f"00:0{cue}" for cue in cues)
    assert parse_subtitles(text) == "[00:01] No.\n[00:02] No.\n[00:03] No. Yes."


def test_a_tag_over_two_lines_is_no_speech():
    assert (
        parse_subtitles("1\n00:00:01,000 --> 00:00:02,000\n<font\ncolor=red>Hello\nyou</font>\n") == "[00:01] Hello you"
    )
