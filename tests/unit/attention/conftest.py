"""Each test chooses its attention kernels anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megalong.attention import kernels


@pytest.fixture(autouse=True)
def _nothing_chosen_yet() -> Iterator[None]:
    caches = (kernels._fastest, kernels._defect, kernels._log_once, kernels.kernel_problem)
    for known in caches:
        known.cache_clear()
    yield
    for known in caches:
        known.cache_clear()
