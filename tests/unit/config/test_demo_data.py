"""The recipe of `make-demo-data`: typed, checked and overridden like a run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalong.config.demo_data import DemoDataConfig, DemoQuestionsConfig, DemoVideosConfig, load_demo_data
from megalong.config.errors import ConfigError

RECIPE = "folder: out\nquestions: {train_sft: 8, train_rl: 4, heldout: 2}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "data.yaml"
    path.write_text(RECIPE)
    return path


def test_overrides_replace_the_recipe_and_the_recipe_the_defaults(recipe: Path) -> None:
    config = load_demo_data(recipe, ["seed=5", "questions.train_rl=6", "videos.max_seconds=180"])
    assert config == DemoDataConfig(
        folder="out",
        seed=5,
        workers=2,
        questions=DemoQuestionsConfig(train_sft=8, train_rl=6, heldout=2, per_video=2),
        videos=DemoVideosConfig(min_seconds=30, max_seconds=180),
    )


ERRORS = {
    "misspelt key": (["questions.trian_rl=3"], "unknown key questions.trian_rl; did you mean questions.train_rl?"),
    "misspelt section": (["question.heldout=3"], "did you mean questions.heldout?"),
    "misspelt top-level key": (["seeds=3"], "did you mean seed?"),
    "wrong type": (["questions.heldout=few"], "questions.heldout must be an integer, got 'few'"),
    "no questions": (["questions.heldout=0"], "questions.heldout=0 must be at least 1"),
    "no workers": (["workers=0"], "workers=0 must be at least 1"),
    "no length": (["videos.min_seconds=0"], "videos.min_seconds=0 must be at least 1"),
    "shortest over longest": (["videos.min_seconds=90"], "videos.max_seconds=60 is less than videos.min_seconds=90"),
}


@pytest.mark.parametrize(("overrides", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_demo_data(recipe, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["folder", "train_sft", "train_rl", "heldout"])
def test_what_has_no_default_is_asked_for(recipe: Path, key: str) -> None:
    recipe.write_text(RECIPE.replace(key, "seed" if key == "folder" else "per_video").replace("seed: out", "seed: 1"))
    with pytest.raises(ConfigError, match=rf"{key} has no value; set it in the recipe or add "):
        load_demo_data(recipe)
