"""What every process group of a layout has in common."""

from __future__ import annotations

import dataclasses
import datetime

import pytest
import torch
from torch.distributed import ProcessGroup

from megalong.config.errors import ConfigError
from megalong.parallel.layout import ParallelLayout, start_process_group


def test_all_groups_wait_longer_than_a_phase_may_last(layout: ParallelLayout) -> None:
    """New groups have torch's default, 10 minutes on GPUs, unless they are given a time."""
    own = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    groups = {name: value for name, value in own.items() if isinstance(value, ProcessGroup)}
    groups["context"] = layout.context.group
    waits = {name: group._get_backend(torch.device("cpu")).options._timeout for name, group in groups.items()}
    assert len(waits) >= 8
    assert set(waits.values()) == {datetime.timedelta(minutes=35)}


def test_more_processes_than_gpus_is_a_mistake_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=4 but this node has 4 GPU.*lower torchrun's --nproc-per-node"):
        start_process_group(timeout=datetime.timedelta(minutes=1))


@pytest.mark.parametrize(("given", "threads"), [(None, 1), ("3", 2)])
def test_a_process_with_a_gpu_computes_on_one_thread_unless_told(
    given: str | None, threads: int, layout: ParallelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    torch.set_num_threads(2)
    try:
        start_process_group(timeout=datetime.timedelta(minutes=1))  # `layout` has the process group already
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
