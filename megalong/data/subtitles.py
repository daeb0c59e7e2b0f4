"""Subtitle files as prompt text: SubRip (.srt) and WebVTT (.vtt) become lines "[mm:ss] text"."""

from __future__ import annotations

import html
import re

_TIMING = re.compile(r"^\s*(?:(\d+):)?(\d{1,2}):(\d{2})[.,]\d{1,3}\s*-->")
# <i>, <c.yellow>, <00:01:02.500> and SubRip's {\an8}: styling, not speech.
_MARKUP = re.compile(r"</?[A-Za-z0-9][^<>]*>|\{\\[^{}]*\}")


def parse_subtitles(text: str) -> str:
    """Return one line "[mm:ss] text" per cue, in file order; the minutes go on past 59.

    A cue is a timing line and the lines up to the next empty one, joined by spaces. Everything outside a
    cue (numbers, the WEBVTT header, NOTE, STYLE and REGION blocks) is left out, so are cues without text.
    Raises ValueError when there is no timing line at all.
    """
    lines: list[str] = []
    num_cues = 0
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        rows = block.split("\n")
        found = [(row, match) for row, match in enumerate(map(_TIMING.match, rows)) if match]
        if not found:
            continue
        num_cues += 1
        row, match = found[0]
        words = html.unescape(_MARKUP.sub("", " ".join(rows[row + 1 :]))).split()
        minutes = int(match[1] or 0) * 60 + int(match[2])
        if words:
            lines.append(f"[{minutes:02d}:{match[3]}] {' '.join(words)}")
    if not num_cues:
        raise ValueError("no cue found, expected timing lines such as 00:01:02,500 --> 00:01:05,000")
    return "\n".join(lines)
