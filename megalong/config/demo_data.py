"""What `megalong make-demo-data RECIPE` draws. Typed like the tree of a run, read by the same loader. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from megalong.config.errors import ConfigError
from megalong.config.load import load_recipe


@dataclass
class DemoQuestionsConfig:
    """Manifest lines of each split, and how many of them ask about one video."""

    train_sft: int = MISSING
    train_rl: int = MISSING
    heldout: int = MISSING
    per_video: int = 2


@dataclass
class DemoVideosConfig:
    min_seconds: int = 30
    max_seconds: int = 60
    """Each video's length is drawn from min_seconds..max_seconds."""


@dataclass
class DemoDataConfig:
    folder: str = MISSING
    """Gets data/ (videos, manifests) and model/ (a tiny random LongVILA)."""
    seed: int = 1
    workers: int = 2
    """Processes that draw and encode; the files do not depend on it."""
    questions: DemoQuestionsConfig = field(default_factory=DemoQuestionsConfig)
    videos: DemoVideosConfig = field(default_factory=DemoVideosConfig)


def load_demo_data(path: str | Path, overrides: Sequence[str] = ()) -> DemoDataConfig:
    """Read a recipe of demo data; see load_recipe. Raises ConfigError, also for values out of bounds."""
    required = ("folder", "questions.train_sft", "questions.train_rl", "questions.heldout")
    config = load_recipe(DemoDataConfig, path, overrides, required=required)
    check_demo_data(config)
    return config


def check_demo_data(config: DemoDataConfig) -> None:
    """Raises ConfigError with every value that is out of bounds."""
    questions, videos = config.questions, config.videos
    counts = {
        "workers": config.workers,
        "questions.train_sft": questions.train_sft,
        "questions.train_rl": questions.train_rl,
        "questions.heldout": questions.heldout,
        "questions.per_video": questions.per_video,
        "videos.min_seconds": videos.min_seconds,
    }
    problems = [f"{key}={value} must be at least 1" for key, value in counts.items() if value < 1]
    if videos.max_seconds < videos.min_seconds:
        problems.append(
            f"videos.max_seconds={videos.max_seconds} is less than videos.min_seconds={videos.min_seconds}; raise it"
        )
    if problems:
        raise ConfigError(problems)
