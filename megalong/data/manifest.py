"""The manifest: one JSON object per line (JSONL, UTF-8), a question about zero or more videos.

The form is LongVideo-Reason's, with additions. Empty lines are skipped, other fields are ignored.

    field         type                 meaning
    problem       string, required     the question; of a multiple choice, the options too: "A. ..", "(A) ..",
                                       "A) .." or "A: ..", starting at A, without a gap
    answer        string, required     the truth, raw or inside <answer>..</answer>
    videos        string or list of    path(s), in the order they appear in the prompt; relative ones start at
                  strings, required    video_dir, or at the manifest's folder. [] for a question without video.
                                       Whether the file is there is found out when it is decoded
    images        string or list of    picture files, put before the videos; to the model each is a video of one
                  strings              frame. With images, videos may be left out
    problem_type  string               "multiple choice", "numerical", "open-ended", ..: picks the accuracy
                                       reward. Default: "multiple choice" when the answer is one capital letter
                                       and the problem has options, else "open-ended". One of BENCHMARK_CATEGORIES,
                                       as in LongVideo-Reason's test split, is read as "general" of that category
    reasoning     string               chain of thought, for SFT, raw or inside <think>..</think>
    problem_id    string or integer    unique; `id` is taken too. Default: the line number
    category      string               kind of question, for the metrics. Default: the one that problem_type names,
                                       else "uncategorised"
    subtitles     string               path of an .srt or .vtt file (relative as `videos`), read here and put
                                       before the question as lines "[mm:ss] text"
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megalong.data.subtitles import parse_subtitles
from megalong.records import Sample

MULTIPLE_CHOICE = "multiple choice"
OPEN_ENDED = "open-ended"
GENERAL = "general"
BENCHMARK_CATEGORIES = ("temporal", "goal", "plot", "spatial")
"""The categories of LongVideo-Reason's test split, in the order of its paper's table."""

_THINK_TAG = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OPTION = re.compile(r"(?:^|(?<=[\s(]))([A-Z])[.):](?=\s*\S)")
# Half of a character, as a text that was cut inside an escaped pair ends in: no tokenizer and no file takes it.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file, the line and the field."""


def read_manifest(path: str | Path, *, video_dir: str | Path | None = None) -> list[Sample]:
    """Read every line of the manifest at `path`, in order. Raises ManifestError at the first bad line.

    video_dir: folder that relative paths of videos and subtitles start from; default: the manifest's own.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file; check data.train or eval.manifest") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text (byte {error.start})") from error

    folder = Path(video_dir) if video_dir is not None else path.parent
    samples: list[Sample] = []
    line_of_id: dict[str, int] = {}
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        sample = _read_sample(_read_object(line, where), number, folder=folder.absolute(), where=where)
        if sample.sample_id in line_of_id:
            raise ManifestError(
                f"{where}: problem_id {sample.sample_id!r} is line {line_of_id[sample.sample_id]}'s; "
                "ids must be unique (leave the field out to use line numbers)"
            )
        line_of_id[sample.sample_id] = number
        samples.append(sample)
    if not samples:
        raise ManifestError(f"{path}: empty, expected one JSON object per line")
    return samples


def option_letters(problem: str) -> str:
    """Letters of the options in a problem's text, "ABCD"; "" when there are fewer than two.

    Options are found in order from A: a stray "(C)" before A, or a letter out of turn, is not one.
    """
    letters = ""
    for match in _OPTION.finditer(problem):
        if ord(match[1]) == ord("A") + len(letters):
            letters += match[1]
    return letters if len(letters) > 1 else ""


def _read_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: bad JSON at column {error.colno}: {error.msg}") from error
    if not isinstance(record, dict):
        raise ManifestError(f"{where}: expected a JSON object, got {_json_type(record)}")
    return record


def _read_sample(record: dict[str, Any], number: int, *, folder: Path, where: str) -> Sample:
    problem = _text(record, "problem", where)
    answer = _read_answer(record, where)
    letters = option_letters(problem)
    is_letter = len(answer) == 1 and "A" <= answer <= "Z"
    problem_type = _text(
        record, "problem_type", where, default=MULTIPLE_CHOICE if is_letter and letters else OPEN_ENDED
    )
    if problem_type == MULTIPLE_CHOICE and (not is_letter or answer not in letters):
        expected = (
            f"one of the problem's options {', '.join(letters)}" if letters else "options in the problem (A. .. B. ..)"
        )
        raise ManifestError(f"{where}: field 'answer' is {answer!r} in a multiple choice, expected {expected}")
    category = "uncategorised"
    if problem_type.casefold() in BENCHMARK_CATEGORIES:
        # Not a multiple choice: some questions of the test split have a letter as the answer and no options.
        category, problem_type = problem_type.casefold(), GENERAL
    return Sample(
        sample_id=_read_id(record, number, where),
        question=problem,
        answer=answer,
        videos=_read_videos(record, folder, where),
        problem_type=problem_type,
        category=_text(record, "category", where, default=category),
        reasoning=_read_reasoning(record, where),
        subtitles=_read_subtitles(record, folder, where),
    )


def _text(record: dict[str, Any], name: str, where: str, *, default: str | None = None) -> str:
    """The stripped text of a field; without a default the field must be there and not be empty."""
    value = record.get(name)
    if value is None:
        if default is None:
            raise ManifestError(f"{where}: field {name!r} is missing, expected a string")
        return default
    if not isinstance(value, str):
        raise ManifestError(f"{where}: field {name!r} is {_json_type(value)}, expected a string")
    if half := _SURROGATE.search(value):
        raise ManifestError(f"{where}: field {name!r} has half of a character, {half[0]!r}, expected valid Unicode")
    if value.strip():
        return value.strip()
    if default is None:
        raise ManifestError(f"{where}: field {name!r} is empty, expected a string")
    return default


def _read_answer(record: dict[str, Any], where: str) -> str:
    raw = _text(record, "answer", where)
    tagged = _ANSWER_TAG.search(raw)
    answer = tagged[1].strip() if tagged else raw
    if not answer:
        raise ManifestError(f"{where}: field 'answer' is empty inside its <answer> tags")
    return answer


def _read_reasoning(record: dict[str, Any], where: str) -> str:
    raw = _text(record, "reasoning", where, default="")
    # The target of SFT puts its own tags around the text: a second pair would teach a badly formed response.
    tagged = _THINK_TAG.search(raw)
    return tagged[1].strip() if tagged else raw


def _read_id(record: dict[str, Any], number: int, where: str) -> str:
    name = "problem_id" if record.get("problem_id") is not None else "id"
    value = record.get(name)
    if value is None:
        return str(number)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ManifestError(f"{where}: field {name!r} is {_json_type(value)}, expected a string or an integer")
    return _text(record, name, where)


def _read_videos(record: dict[str, Any], folder: Path, where: str) -> tuple[str, ...]:
    """Pictures, then videos."""
    images = _read_paths(record, "images", folder, where) if record.get("images") is not None else ()
    if images and record.get("videos") is None:
        return images
    return (*images, *_read_paths(record, "videos", folder, where))


def _read_paths(record: dict[str, Any], name: str, folder: Path, where: str) -> tuple[str, ...]:
    value = record.get(name)
    if value is None:
        raise ManifestError(f"{where}: field {name!r} is missing, expected a path or a list of paths")
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list):
        raise ManifestError(f"{where}: field {name!r} is {_json_type(value)}, expected a path or a list of paths")
    for path in paths:
        if not isinstance(path, str):
            raise ManifestError(f"{where}: field {name!r} holds {_json_type(path)}, expected paths")
        if not path.strip():
            raise ManifestError(f"{where}: field {name!r} holds an empty path")
        if "\0" in path or _SURROGATE.search(path):
            raise ManifestError(f"{where}: field {name!r} holds {path!r}, which is no path: it is not valid text")
    return tuple(str(folder / path.strip()) for path in paths)


def _read_subtitles(record: dict[str, Any], folder: Path, where: str) -> str:
    name = _text(record, "subtitles", where, default="")
    if not name:
        return ""
    path = folder / name
    if path.suffix.lower() not in (".srt", ".vtt"):
        raise ManifestError(f"{where}: field 'subtitles' is {name!r}, expected an .srt or .vtt file")
    try:
        return parse_subtitles(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ManifestError(f"{where}: subtitles {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where}: subtitles {path} are not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        raise ManifestError(f"{where}: subtitles {path}: {error}") from error


def _json_type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]
