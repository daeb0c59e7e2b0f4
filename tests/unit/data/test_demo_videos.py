"""The demo's videos and manifests: deterministic, balanced, held-out apart, and answered by what is shown."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from megalong.config.demo_data import DemoDataConfig, DemoQuestionsConfig, DemoVideosConfig
from megalong.config.errors import ConfigError
from megalong.data.demo_render import CELL, FRAME_SIZE, RGB, render
from megalong.data.demo_tasks import ASK, CATEGORIES, COLOURS, CORNERS, DRAW, Goal, Plot, Scenario, Spatial, Temporal
from megalong.data.demo_videos import (
    LETTERS,
    DemoData,
    Video,
    ask_questions,
    draw_frame,
    draw_new,
    draw_videos,
    make_demo_data,
)

BACKDROP = (128, 128, 128)


def demo_data(seed: int, **questions: int) -> DemoDataConfig:
    counts = {"train_sft": 8, "train_rl": 8, "heldout": 8, "per_video": 2, **questions}
    return DemoDataConfig(seed=seed, workers=1, questions=DemoQuestionsConfig(**counts))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return make_demo_data(tmp_path_factory.mktemp("demo"), demo_data(3))


def drawn(split: str, count: int, *, rng: random.Random, used: set[Scenario]) -> list[Video]:
    return draw_videos(split, count, lengths=DemoVideosConfig(), rng=rng, used=used)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.*"))
        if path.is_file()
    }


def shows(frame_HWC: np.ndarray, colour: str) -> bool:
    return bool((frame_HWC == RGB[colour]).all(-1).any())


def white_corner(frame_HWC: np.ndarray) -> str:
    """The corner, seen from the middle of the picture, that the white disc is in."""
    rows, columns = np.nonzero((frame_HWC == RGB["white"]).all(-1))
    south, east = rows.mean() > FRAME_SIZE / 2, columns.mean() > FRAME_SIZE / 2
    return ("south" if south else "north") + ("east" if east else "west")


def colour_in_corner(frame_HWC: np.ndarray, corner: str) -> str:
    """The one palette colour inside a corner cell."""
    rows = slice(2 * CELL, None) if corner.startswith("south") else slice(0, CELL)
    columns = slice(2 * CELL, None) if corner.endswith("east") else slice(0, CELL)
    (colour,) = [name for name in COLOURS if shows(frame_HWC[rows, columns], name)]
    return colour


def scenarios(category: str, count: int) -> list:
    rng = random.Random(11)
    return [DRAW[category](rng) for _ in range(count)]


def test_same_seed_same_bytes_other_seed_other_videos(data: DemoData, tmp_path: Path) -> None:
    again = make_demo_data(tmp_path / "again", dataclasses.replace(demo_data(3), workers=2))
    assert hashes(again.videos.parent) == hashes(data.videos.parent)
    other = make_demo_data(tmp_path / "other", demo_data(4))
    assert not set(hashes(other.videos).values()) & set(hashes(data.videos).values())


def test_manifest_fields(data: DemoData) -> None:
    for path in (data.train_sft, data.train_rl, data.heldout):
        lines = read_lines(path)
        assert len(lines) == 8
        assert len({line["problem_id"] for line in lines}) == 8
        assert {line["category"] for line in lines} == set(CATEGORIES)
        for line in lines:
            assert (path.parent / line["videos"]).is_file()
            assert line["answer"].startswith("<answer>")
            assert line["answer"].endswith("</answer>")
            assert line["problem_type"] in {"multiple choice", "open-ended", "numerical"}
            assert bool(line["reasoning"]) == (path == data.train_sft)


def test_videos_are_h264_of_30_to_180_seconds(data: DemoData) -> None:
    files = sorted(data.videos.glob("*.mp4"))
    assert len(files) == 12  # 24 questions, two on each
    for file in files:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert (stream.width, stream.height) == (FRAME_SIZE, FRAME_SIZE)
            assert 30 <= float(stream.duration * stream.time_base) <= 180


def test_encoded_frames_show_what_was_drawn(tmp_path: Path) -> None:
    make_demo_data(tmp_path, demo_data(5, train_sft=4, train_rl=1, heldout=1, per_video=1))
    for video in drawn("train_sft", 4, rng=random.Random(5), used=set()):
        with av.open(str(tmp_path / "videos" / video.name)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for index in (0, len(decoded) // 3, len(decoded) - 1):
            error = np.abs(decoded[index].astype(float) - draw_frame(video, index)).mean()
            assert error < 6.0, (video.name, index, error)


def test_no_scenario_and_no_opening_frame_is_in_two_splits() -> None:
    rng, used = random.Random(1), set()
    splits = {split: drawn(split, 60, rng=rng, used=used) for split in ("train_sft", "train_rl", "heldout")}
    shown = [video.scenario for videos in splits.values() for video in videos]
    assert len(set(shown)) == len(shown) == len(used) == 180
    train = {draw_frame(video, 0).tobytes() for split in ("train_sft", "train_rl") for video in splits[split]}
    assert not train & {draw_frame(video, 0).tobytes() for video in splits["heldout"]}


def test_letters_are_balanced_in_every_category() -> None:
    rng, used = random.Random(2), set()
    lines = ask_questions("train_rl", drawn("train_rl", 400, rng=rng, used=used), per_video=2, rng=rng)
    for category in CATEGORIES:
        asked = [line for line in lines if line["category"] == category and line["problem_type"] == "multiple choice"]
        counts = Counter(line["answer"].removeprefix("<answer>").removesuffix("</answer>") for line in asked)
        assert set(counts) == set(LETTERS)
        assert len(asked) >= 120
        assert all(0.17 <= count / len(asked) <= 0.33 for count in counts.values()), (category, counts)


def test_options_say_nothing_without_the_video() -> None:
    rng, used = random.Random(2), set()
    answers: dict[str, set[str]] = {}
    lines = ask_questions("train_rl", drawn("train_rl", 400, rng=rng, used=used), per_video=2, rng=rng)
    for line in lines:
        if line["problem_type"] == "multiple choice":
            answers.setdefault(line["problem"], set()).add(line["answer"])
    for problem, seen in answers.items():
        assert seen == {f"<answer>{letter}</answer>" for letter in LETTERS}, problem


def test_a_letter_names_the_option_that_the_reasoning_concludes() -> None:
    rng, used = random.Random(6), set()
    lines = ask_questions("train_rl", drawn("train_rl", 80, rng=rng, used=used), per_video=2, rng=rng)
    for line in lines:
        if line["problem_type"] != "multiple choice":
            continue
        letter = line["answer"].removeprefix("<answer>").removesuffix("</answer>")
        options = dict(option.split(". ") for option in line["problem"].split("\n")[1:])
        *_, conclusion, verdict = line["reasoning"].removesuffix(".").split(". ")
        assert verdict == f"So {letter}"
        assert conclusion.split()[-1] == options[letter]


def test_temporal_answers_follow_from_the_frames() -> None:
    for scenario in scenarios("temporal", 20):
        assert isinstance(scenario, Temporal)
        moments = [(index + 0.5) / len(scenario.events) for index in range(len(scenario.events))]
        seen = [
            [name for name in COLOURS if shows(render(scenario, moment, backdrop=BACKDROP), name)] for moment in moments
        ]
        assert all(len(colours) == 1 for colours in seen)
        answers = {question.text: question.answer for question in ASK["temporal"](scenario)}
        assert answers["How many shapes appear?"] == str(len(seen))
        assert answers["Which colour appears first?"] == seen[0][0]
        assert answers["Which colour appears last?"] == seen[-1][0]


def test_spatial_answers_follow_from_the_frames() -> None:
    for scenario in scenarios("spatial", 20):
        assert isinstance(scenario, Spatial)
        start, end = (render(scenario, moment, backdrop=BACKDROP) for moment in (0.0, 1.0))
        answers = {question.text: question.answer for question in ASK["spatial"](scenario)}
        assert answers["Where is the ball at the end?"] == white_corner(end)
        assert answers["Which box does the ball go into?"] == colour_in_corner(start, white_corner(start))
        assert colour_in_corner(end, white_corner(end)) == colour_in_corner(start, white_corner(start))
        hidden = render(scenario, 0.5, backdrop=BACKDROP)
        assert not shows(hidden, "white")


def test_goal_answers_follow_from_the_frames() -> None:
    for scenario in scenarios("goal", 20):
        assert isinstance(scenario, Goal)
        end = render(scenario, 1.0, backdrop=BACKDROP)
        answers = {question.text: question.answer for question in ASK["goal"](scenario)}
        assert answers["Which way does the agent go?"] == white_corner(end)
        assert answers["Which target does the agent want to reach?"] == colour_in_corner(end, white_corner(end))
        assert CORNERS[scenario.heading] == white_corner(end)


def test_plot_answers_follow_from_the_frames() -> None:
    asked = set()
    for scenario in scenarios("plot", 40):
        assert isinstance(scenario, Plot)
        frames = [render(scenario, moment, backdrop=BACKDROP) for moment in (0.1, 0.9)]
        looks = []
        for frame_HWC in frames:
            (colour,) = [name for name in COLOURS if shows(frame_HWC, name)]
            inside = (frame_HWC == RGB[colour]).all(-1)
            place = round(float(np.nonzero(inside)[1].mean()) / CELL - 0.5)
            floor = tuple(int(value) for value in frame_HWC[0, FRAME_SIZE // 2])
            looks.append(
                {"colour": colour, "size": int(inside.sum()) > CELL**2 // 4, "position": place, "light": floor}
            )
        changed = [name for name in looks[0] if looks[0][name] != looks[1][name]]
        answers = {question.text: question.answer for question in ASK["plot"](scenario)}
        assert changed == [answers["What changes in the second scene?"]]
        assert answers["What colour is the shape in the first scene?"] == looks[0]["colour"]
        assert answers["What colour is the shape in the second scene?"] == looks[1]["colour"]
        asked.add(scenario.change)
    assert asked == {"colour", "size", "position", "light"}


def test_running_out_of_scenarios_is_an_error() -> None:
    rng, used = random.Random(0), set()
    for _ in range(24 * 3 * 4):  # target orders x shapes x glances that have the agent go to one corner
        draw_new("goal", option=0, rng=rng, used=used)
    message = "no unused goal scenario left after 10000 draws; ask for fewer questions.train_sft"
    with pytest.raises(ConfigError, match=message):
        draw_new("goal", option=0, rng=rng, used=used)


def test_too_many_videos_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no unused goal scenario left"):
        make_demo_data(tmp_path / "data", demo_data(1, heldout=8000, per_video=1))
    assert not (tmp_path / "data").exists()


def test_a_moment_outside_the_story_is_refused() -> None:
    with pytest.raises(ValueError, match="moment must be within 0..1, got 1.5"):
        render(scenarios("goal", 1)[0], 1.5, backdrop=BACKDROP)
