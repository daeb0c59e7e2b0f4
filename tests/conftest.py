"""Fixtures that more than one folder of tests needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton decides when it is first imported, and megatron-core may import it before the tests of the kernels do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def layout() -> Iterator[object]:
    """The layout of a run of one process; megatron-core is imported only by the tests that ask for it."""
    from megalong.parallel.layout import destroy_layout, make_layout

    yield make_layout(tp=1, cp=1, pp=1, seed=1)
    destroy_layout()


@pytest.fixture(scope="module")
def group() -> Iterator[object]:
    """A process group of one, without megatron-core: the layout's, when a test has made one."""
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if started:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LongVILA-layout checkpoint that fits in a test: read-only, copy it before changing a file."""
    from megalong.data.sequence import THINKING_TEMPLATE
    from megalong.models.longvila.demo_checkpoint import DemoModelSize, make_demo_checkpoint

    size = DemoModelSize(
        hidden=32, layers=2, intermediate=48, vocab=320, tower_hidden=16, tower_intermediate=24, tower_heads=2
    )
    return make_demo_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "model", texts=[THINKING_TEMPLATE], seed=3, size=size
    )
