"""Subtitle files as prompt text: SubRip (.srt) and WebVTT (.vtt) become lines "[mm:ss] text"."""

from __future__ import annotations

import html
import re

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
_TIMING = re.compile(rf"^\s*{_TIME}\s*-->(?:\s*{_TIME})?")
# <i>, <c.yellow>, <00:01:02.500> and SubRip's {\an8}: styling, not speech.
_WORD_TIME = re.compile(rf"<{_TIME}>")
_MARKUP = re.compile(r"</?[A-Za-z0-9][^<>]*>|\{\\[^{}]*\}")


def parse_subtitles(text: str) -> str:
    """Return one line "[mm:ss] text" per cue, in file order; the minutes go on past 59.

    A cue is a timing line and the lines up to the next empty one or the next timing line, joined by spaces. In
    automatic captions that roll, which have words with times or cues of at most 10 ms, lines that stay on the screen
    from the cue before are not said again. Everything outside a cue (numbers, the WEBVTT header, NOTE, STYLE and REGION
    blocks) is left out, so are cues without text. Raises ValueError when there is no timing line at all.
    """
    is_vtt = text.startswith("WEBVTT")
    cues: list[tuple[int, int, list[str]]] = []  # begin and end in ms, lines
    rows: list[str] = []  # of the cue that is open; outside a cue nobody reads them
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if match := _TIMING.match(line):
            # The number of this cue, where no empty line ends the cue before; WebVTT needs no numbers.
            if not is_vtt and rows and rows[-1].strip().isdecimal():
                rows.pop()
            rows = []
            begin = _milliseconds(*match.groups()[:4])
            cues.append((begin, _milliseconds(*match.groups()[4:]) if match[7] else begin, rows))
        # Automatic captions in WebVTT have lines of one space inside a cue; there only length 0 is empty.
        elif not (line if is_vtt else line.strip(" \t")):
            rows = []
        else:
            rows.append(line)
    if not cues:
        raise ValueError("no cue found, expected timing lines such as 00:01:02,500 --> 00:01:05,000")
    rolls = _WORD_TIME.search(text) is not None or any(0 < end - begin <= 10 for begin, end, _ in cues)
    spoken, before, since, until = [], [], 0, -1
    for begin, end, rows in cues:
        shown = html.unescape(_MARKUP.sub("", "\n".join(rows))).split("\n")
        shown = [line for part in shown if (line := " ".join(part.split()))]
        stays = _overlap(before, shown) if rolls and since <= begin <= until else 0
        if shown[stays:]:
            seconds = begin // 1000
            spoken.append(f"[{seconds // 60:02d}:{seconds % 60:02d}] {' '.join(shown[stays:])}")
        before, since, until = shown, begin, end
    return "\n".join(spoken)


def _milliseconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> int:
    return ((int(hours or 0) * 60 + int(minutes)) * 60 + int(seconds)) * 1000 + int(fraction.ljust(3, "0"))


def _overlap(before: list[str], shown: list[str]) -> int:
    """How many lines at the end of `before` are those at the beginning of `shown`, at most."""
    most = min(len(before), len(shown))
    return next((count for count in range(most, 0, -1) if before[-count:] == shown[:count]), 0)
