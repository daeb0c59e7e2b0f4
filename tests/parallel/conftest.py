"""The tiny demo that the runs of this folder train on."""

from __future__ import annotations

import pytest
from harness import DemoWorld, make_demo_world


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    """Made once."""
    return make_demo_world(tmp_path_factory.mktemp("demo"))
