"""Make the demo's data: small H.264 videos of the demo world and LongVideo-Reason style manifests.

<out_dir>/videos/*.mp4   train_sft.jsonl (with reasoning)   train_rl.jsonl   heldout.jsonl
"""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from megalong.config.demo_data import DemoDataConfig, DemoVideosConfig
from megalong.config.errors import ConfigError
from megalong.data.demo_render import FRAME_SIZE, render
from megalong.data.demo_tasks import ASK, CATEGORIES, DRAW, Question, Scenario

LETTERS = "ABCD"
OPEN_SHARE = 0.2
"""Share of questions without options."""
WORDS_SHARE = 0.65
"""SFT only: of the multiple-choice questions about a video's course, the share whose annotation names the right
option's text instead of its letter. SFT learns that habit; a reward that wants the letter unlearns it."""
VIDEO_FPS = 2
KEYFRAME_EVERY = 4
"""Frames between keyframes: a short distance keeps reading a few frames of a file cheap."""
MAX_DRAWS = 10_000
"""Tries to find a scenario that no other video shows before giving up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One video to make: what it shows, for how long, on which background."""

    name: str  # file name below <out_dir>/videos
    category: str
    scenario: Scenario
    seconds: int
    backdrop: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoData:
    """Paths of what `make_demo_data` wrote."""

    train_sft: Path
    train_rl: Path
    heldout: Path
    videos: Path


def make_demo_data(out_dir: Path, config: DemoDataConfig) -> DemoData:
    """Write videos and manifests; the same settings give the same files.

    Categories come in turn. No scenario is shown by two videos, so held-out videos share nothing with training ones.
    Raises ConfigError, before anything is written, when more videos are asked for than there are scenarios.
    """
    rng = random.Random(config.seed)
    used: set[Scenario] = set()
    todo: list[Video] = []
    manifests = {}
    per_video = config.questions.per_video
    for split in ("train_sft", "train_rl", "heldout"):
        count = getattr(config.questions, split)
        videos = draw_videos(split, -(-count // per_video), lengths=config.videos, rng=rng, used=used)
        lines = ask_questions(split, videos, per_video=per_video, rng=rng)[:count]
        if split != "train_sft":
            lines = [{**line, "reasoning": ""} for line in lines]
        manifests[split] = "".join(json.dumps(line) + "\n" for line in lines)
        todo += videos
    folder = Path(out_dir) / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder.parent / f"{split}.jsonl" for split in manifests}
    for split, text in manifests.items():
        paths[split].write_text(text, encoding="utf-8")
    with ProcessPoolExecutor(max_workers=config.workers) as pool:
        for _ in pool.map(write_video, todo, [folder] * len(todo), chunksize=8):
            pass
    return DemoData(videos=folder, **paths)


def draw_videos(
    split: str, count: int, *, lengths: DemoVideosConfig, rng: random.Random, used: set[Scenario]
) -> list[Video]:
    """`count` videos with scenarios not in `used` (which grows by them), categories in turn."""
    videos = []
    decks: dict[str, list[int]] = {category: [] for category in CATEGORIES}
    for index in range(count):
        category = CATEGORIES[index % len(CATEGORIES)]
        if not decks[category]:
            decks[category] = rng.sample(range(len(LETTERS)), len(LETTERS))
        videos.append(
            Video(
                name=f"{split}_{index:05d}_{category}.mp4",
                category=category,
                scenario=draw_new(category, option=decks[category].pop(), rng=rng, used=used),
                seconds=rng.randint(lengths.min_seconds, lengths.max_seconds),
                backdrop=(rng.randint(115, 140), rng.randint(115, 140), rng.randint(115, 140)),
            )
        )
    return videos


def draw_new(category: str, *, option: int, rng: random.Random, used: set[Scenario]) -> Scenario:
    """A scenario not in `used` (it is added) whose first question is answered by its option number `option`."""
    for _ in range(MAX_DRAWS):
        scenario = DRAW[category](rng)
        first = ASK[category](scenario)[0]
        if scenario not in used and first.answer == first.options[option]:
            used.add(scenario)
            return scenario
    raise ConfigError(
        f"no unused {category} scenario left after {MAX_DRAWS} draws; ask for fewer questions.train_sft, "
        "questions.train_rl or questions.heldout, or for more questions.per_video"
    )


def ask_questions(split: str, videos: list[Video], *, per_video: int, rng: random.Random) -> list[dict]:
    """Manifest lines: per video one question about its course and the rest about colours."""
    asked = {category: Counter() for category in CATEGORIES}
    lines = []
    for video in videos:
        course, *colours = ASK[video.category](video.scenario)
        for number in range(per_video):
            # Among the colour questions, the answer that its category has heard least: letters stay balanced.
            rng.shuffle(colours)
            colours.sort(key=lambda question: asked[video.category][question.answer])
            question = colours.pop(0) if number % 2 and colours else course
            asked[video.category][question.answer] += 1
            base = {
                "problem_id": f"{video.name.removesuffix('.mp4')}_{number}",
                "data_type": "video",
                "videos": f"videos/{video.name}",
                "category": video.category,
            }
            fields = phrase(question, with_options=rng.random() >= OPEN_SHARE)
            if split == "train_sft" and question is course and rng.random() < WORDS_SHARE:
                kind = "numerical" if question.answer.isdigit() else "open-ended"
                fields |= {"reasoning": question.reasoning, "answer": f"<answer>{question.answer}</answer>"}
                fields["problem_type"] = kind
            lines.append({**base, **fields})
    return lines


def phrase(question: Question, *, with_options: bool) -> dict[str, str]:
    """The manifest fields that depend on how the question is put."""
    if not with_options:
        kind = "numerical" if question.answer.isdigit() else "open-ended"
        how = "a number" if kind == "numerical" else "one word"
        return {
            "problem": f"{question.text} Answer with {how}.",
            "problem_type": kind,
            "reasoning": question.reasoning,
            "answer": f"<answer>{question.answer}</answer>",
        }
    letter = LETTERS[question.options.index(question.answer)]
    listed = "\n".join(f"{name}. {option}" for name, option in zip(LETTERS, question.options, strict=True))
    return {
        "problem": f"{question.text}\n{listed}",
        "problem_type": "multiple choice",
        "reasoning": f"{question.reasoning} So {letter}.",
        "answer": f"<answer>{letter}</answer>",
    }


def write_video(video: Video, folder: Path) -> None:
    """Draw and encode one video as H.264 in an MP4 file."""
    num_frames = video.seconds * VIDEO_FPS
    with av.open(str(folder / video.name), "w") as container:
        stream = container.add_stream("libx264", rate=VIDEO_FPS)
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, VIDEO_FPS)
        stream.gop_size = KEYFRAME_EVERY
        # One thread: the bytes then depend on the pixels alone.
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": "20"}
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw_frame(video, index), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, VIDEO_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def draw_frame(video: Video, index: int) -> np.ndarray:
    """Frame `index` of the video before encoding: uint8 RGB [FRAME_SIZE, FRAME_SIZE, 3]."""
    last = video.seconds * VIDEO_FPS - 1
    return render(video.scenario, index / last, backdrop=video.backdrop)
