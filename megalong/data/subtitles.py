"""Subtitle files as prompt text: SubRip (.srt) and WebVTT (.vtt) become lines "[mm:ss] text"."""

from __future__ import annotations

import html
import re

_TIMING = re.compile(r"^\s*(?:(\d+):)?(\d{1,2}):(\d{2})[.,]\d{1,3}\s*-->")
# <i>, <c.yellow>, <00:01:02.500> and SubRip's {\an8}: styling, not speech.
_MARKUP = re.compile(r"</?[A-Za-z0-9][^<>]*>|\{\\[^{}]*\}")


def parse_subtitles(text: str) -> str:
    """Return one line "[mm:ss] text" per cue, in file order; the minutes go on past 59.

    A cue is a timing line and the lines up to the next empty one or the next timing line, joined by spaces.
    Everything outside a cue (numbers, the WEBVTT header, NOTE, STYLE and REGION blocks) is left out, so are cues
    without text. Raises ValueError when there is no timing line at all.
    """
    is_vtt = text.startswith("WEBVTT")
    cues: list[tuple[str, list[str]]] = []
    rows: list[str] = []  # of the cue that is open; outside a cue nobody reads them
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if match := _TIMING.match(line):
            # The number of this cue, where no empty line ends the cue before; WebVTT needs no numbers.
            if not is_vtt and rows and rows[-1].strip().isdecimal():
                rows.pop()
            rows = []
            minutes = int(match[1] or 0) * 60 + int(match[2])
            cues.append((f"[{minutes:02d}:{match[3]}]", rows))
        # Automatic captions in WebVTT have lines of one space inside a cue; there only length 0 is empty.
        elif not (line if is_vtt else line.strip(" \t")):
            rows = []
        else:
            rows.append(line)
    if not cues:
        raise ValueError("no cue found, expected timing lines such as 00:01:02,500 --> 00:01:05,000")
    spoken = ((start, html.unescape(_MARKUP.sub("", " ".join(rows))).split()) for start, rows in cues)
    return "\n".join(" ".join([start, *words]) for start, words in spoken if words)
