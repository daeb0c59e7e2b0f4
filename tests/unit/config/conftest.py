"""What several tests of the configuration are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalong.config.longvila_shape import read_longvila_shape
from megalong.config.model_shape import ModelShape
from megalong.config.shapes import SHIPPED_SHAPES


@pytest.fixture
def recipe(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file with the test module's RECIPE."""
    path = tmp_path / "r.yaml"
    path.write_text(request.module.RECIPE)
    return path


@pytest.fixture(scope="session")
def shape() -> ModelShape:
    """Of the 7B LongVILA that ships."""
    return read_longvila_shape(SHIPPED_SHAPES["longvila"])
