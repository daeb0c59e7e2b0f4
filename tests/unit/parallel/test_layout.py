"""What every process group of a layout has in common."""

from __future__ import annotations

import dataclasses
import datetime

import torch
from torch.distributed import ProcessGroup

from megalong.parallel.layout import ParallelLayout


def test_all_groups_wait_longer_than_a_phase_may_last(layout: ParallelLayout) -> None:
    """New groups have torch's default, 10 minutes on GPUs, unless they are given a time."""
    own = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    groups = {name: value for name, value in own.items() if isinstance(value, ProcessGroup)}
    groups["context"] = layout.context.group
    waits = {name: group._get_backend(torch.device("cpu")).options._timeout for name, group in groups.items()}
    assert len(waits) >= 8
    assert set(waits.values()) == {datetime.timedelta(minutes=35)}
