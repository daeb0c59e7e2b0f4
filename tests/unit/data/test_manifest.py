import json
import re

import pytest

from megalong.data.manifest import ManifestError, option_letters, read_manifest
from megalong.records import Sample
from megalong.rewards.functions import check_problem_types

CHOICE = "What is cut first?\nA. the rope\nB. the cake\nC. the grass\nD. nothing"


def line(**changes):
    """A good line with changes; a field set to ... is left out."""
    record = {"problem": CHOICE, "answer": "<answer>B</answer>", "videos": "a.mp4", **changes}
    return json.dumps({name: value for name, value in record.items() if value is not ...})


def write(folder, *lines):
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_longvideo_reason_line(tmp_path):
    path = write(tmp_path, line(problem_id=17, data_type="video", problem_type="multiple choice", reasoning=" Look. "))
    assert read_manifest(path) == [
        Sample(
            sample_id="17",
            question=CHOICE,
            answer="B",
            videos=(str(tmp_path / "a.mp4"),),
            problem_type="multiple choice",
            category="uncategorised",
            reasoning="Look.",
            subtitles="",
        )
    ]


def test_added_fields(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.srt").write_text("1\n00:00:03,000 --> 00:00:04,000\nHi\n")
    extra = {"id": "q-1", "category": "temporal", "subtitles": "a.srt", "videos": ["a.mp4", "/films/b.mkv"]}
    path = write(tmp_path, line(**extra))
    (sample,) = read_manifest(path, video_dir=tmp_path / "media")
    assert sample.sample_id == "q-1"
    assert sample.category == "temporal"
    assert sample.subtitles == "[00:03] Hi"
    assert sample.videos == (str(tmp_path / "media" / "a.mp4"), "/films/b.mkv")


def test_images_stand_before_videos_and_may_replace_them(tmp_path):
    path = write(tmp_path, line(images=["a.png", "b.jpg"]), line(images="c.png", videos=...), line(images=[]))
    found = [[name.removeprefix(f"{tmp_path}/") for name in sample.videos] for sample in read_manifest(path)]
    assert found == [["a.png", "b.jpg", "a.mp4"], ["c.png"], ["a.mp4"]]


def test_paths_are_absolute_from_a_relative_manifest(tmp_path, monkeypatch):
    write(tmp_path, line())
    monkeypatch.chdir(tmp_path)
    assert read_manifest("train.jsonl")[0].videos == (str(tmp_path / "a.mp4"),)


def test_ids_default_to_line_numbers_and_empty_lines_are_skipped(tmp_path):
    path = write(tmp_path, "\ufeff" + line(), "", "   ", line(videos=[]), line(id=None))
    samples = read_manifest(path)
    assert [sample.sample_id for sample in samples] == ["1", "4", "5"]
    assert samples[1].videos == ()


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    path = write(tmp_path, '{"problem": "one\u2028two", "answer": "x", "videos": "a.mp4"}', line())
    assert [sample.question for sample in read_manifest(path)] == ["one\u2028two", CHOICE]


@pytest.mark.parametrize(
    ("problem", "raw", "answer", "problem_type"),
    [
        (CHOICE, "D", "D", "multiple choice"),
        (CHOICE, "<answer>\n C \n</answer>", "C", "multiple choice"),
        (CHOICE, "Reasoned. <answer>A</answer> Done.", "A", "multiple choice"),
        (CHOICE, "the rope", "the rope", "open-ended"),
        ("Which grade does he get?", "A", "A", "open-ended"),
        ("How many?", " <answer>two\nor three</answer>", "two\nor three", "open-ended"),
    ],
)
def test_answer_and_default_type(tmp_path, problem, raw, answer, problem_type):
    (sample,) = read_manifest(write(tmp_path, line(problem=problem, answer=raw)))
    assert (sample.answer, sample.problem_type) == (answer, problem_type)


@pytest.mark.parametrize(
    ("raw", "reasoning"),
    [
        ("It rains.", "It rains."),
        ("<think>\nIt rains,\nso B.\n</think>", "It rains,\nso B."),
        ("<think>It rains.</think><answer>B</answer>", "It rains."),
        ("<think> </think>", ""),
    ],
)
def test_reasoning_is_taken_out_of_its_think_tags(tmp_path, raw, reasoning):
    assert read_manifest(write(tmp_path, line(reasoning=raw)))[0].reasoning == reasoning


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"problem_type": "temporal"}, ("general", "temporal")),
        ({"problem_type": " Goal "}, ("general", "goal")),
        ({"problem_type": "plot", "problem": "What?"}, ("general", "plot")),  # the split has letters without options
        ({"problem_type": "spatial", "category": "Rooms"}, ("general", "Rooms")),
        ({"problem_type": "general"}, ("general", "uncategorised")),
    ],
)
def test_a_category_as_the_problem_type_is_a_general_question_of_that_category(tmp_path, fields, kind):
    (sample,) = read_manifest(write(tmp_path, line(**fields)))
    assert (sample.problem_type, sample.category) == kind
    check_problem_types([sample])


@pytest.mark.parametrize(
    ("problem", "letters"),
    [
        (CHOICE, "ABCD"),
        ("Which? (A) red (B) green (C) blue", "ABC"),
        ("Which?\nA) red\nB) green", "AB"),
        ("Which?\nA: red\nB: green", "AB"),
        ("Options: A.red B.green", "AB"),
        ("Plan B. fails, why? (C) too. A. late B. lost", "AB"),
        ("Which?\nA. red\nC. blue", ""),
        ("Is it vitamin A. or iron?", ""),
        ("Open question?", ""),
    ],
)
def test_option_letters(problem, letters):
    assert option_letters(problem) == letters


BAD_LINES = {
    "bad JSON": ('{"problem": ', "bad JSON at column 13: Expecting value"),
    "not an object": ("[1, 2]", "expected a JSON object, got a list"),
    "null": ("null", "expected a JSON object, got null"),
    "no problem": (line(problem=...), "field 'problem' is missing, expected a string"),
    "empty problem": (line(problem=" \n"), "field 'problem' is empty, expected a string"),
    "problem not text": (line(problem=3), "field 'problem' is a number, expected a string"),
    "problem cut inside a character": (
        line(problem="What is \ud83d"),
        r"field 'problem' has half of a character, '\ud83d', expected valid Unicode",
    ),
    "no answer": (line(answer=...), "field 'answer' is missing, expected a string"),
    "null answer": (line(answer=None), "field 'answer' is missing, expected a string"),
    "empty answer": (line(answer=""), "field 'answer' is empty, expected a string"),
    "empty tags": (line(answer="<answer> </answer>"), "field 'answer' is empty inside its <answer> tags"),
    "answer not text": (line(answer=["B"]), "field 'answer' is a list, expected a string"),
    "no such option": (
        line(answer="E"),
        "field 'answer' is 'E' in a multiple choice, expected one of the problem's options A, B, C, D",
    ),
    "option in words": (
        line(answer="the cake", problem_type="multiple choice"),
        "field 'answer' is 'the cake' in a multiple choice, expected one of the problem's options A, B, C, D",
    ),
    "choice without options": (
        line(problem="What?", problem_type="multiple choice"),
        "field 'answer' is 'B' in a multiple choice, expected options in the problem (A. .. B. ..)",
    ),
    "no videos": (line(videos=...), "field 'videos' is missing, expected a path or a list of paths"),
    "empty video": (line(videos=""), "field 'videos' holds an empty path"),
    "video with a zero byte": (
        line(videos=["a.mp4", "b\0.mp4"]),
        r"field 'videos' holds 'b\x00.mp4', which is no path: it is not valid text",
    ),
    "image not text": (line(images=["a.png", 3]), "field 'images' holds a number, expected paths"),
    "no images and no videos": (line(images=[], videos=...), "field 'videos' is missing"),
    "video not text": (line(videos=["a.mp4", 3]), "field 'videos' holds a number, expected paths"),
    "videos an object": (line(videos={"a": 1}), "field 'videos' is an object, expected a path or a list of paths"),
    "type not text": (line(problem_type=True), "field 'problem_type' is a boolean, expected a string"),
    "category not text": (line(category=1.5), "field 'category' is a number, expected a string"),
    "reasoning not text": (line(reasoning=[]), "field 'reasoning' is a list, expected a string"),
    "id not text": (line(problem_id=1.5), "field 'problem_id' is a number, expected a string or an integer"),
    "id a boolean": (line(id=True), "field 'id' is a boolean, expected a string or an integer"),
    "empty id": (line(id=" "), "field 'id' is empty, expected a string"),
    "duplicate id": (line(id="0"), "problem_id '0' is line 1's; ids must be unique"),
    "no subtitles": (line(subtitles="a.srt"), "subtitles {folder}/a.srt cannot be read: No such file"),
    "subtitles of another kind": (line(subtitles="a.ass"), "field 'subtitles' is 'a.ass', expected an .srt or .vtt"),
    "subtitles without cues": (line(subtitles="empty.vtt"), "subtitles {folder}/empty.vtt: no cue found"),
    "subtitles not text": (line(subtitles="latin.srt"), "subtitles {folder}/latin.srt are not UTF-8 text (byte 2)"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line(tmp_path, case):
    (tmp_path / "empty.vtt").write_text("WEBVTT\n")
    (tmp_path / "latin.srt").write_bytes("1\n\xe9t\xe9".encode("latin-1"))
    bad, message = BAD_LINES[case]
    path = write(tmp_path, line(id="0"), bad)
    expected = f"{path}:2: " + message.format(folder=tmp_path)
    with pytest.raises(ManifestError, match=re.escape(expected)):
        read_manifest(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; check data.train or eval.manifest"),
        (b"", "empty, expected one JSON object per line"),
        (b"\n \n", "empty, expected one JSON object per line"),
        (b'{"problem": "\xff"}', "not UTF-8 text (byte 13)"),
    ],
)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ManifestError, match=re.escape(f"{path}: {message}")):
        read_manifest(path)


def test_a_folder_is_not_a_manifest(tmp_path):
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path)
