"""Tensors in files in memory, which two processes of a host share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from megalong.rollout.engine import RolloutEngineError


def shared_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A file as a tensor. Raises RolloutEngineError when there is no room: a write would end the process (SIGBUS)."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    try:
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise RolloutEngineError(
            f"{path}: {num_bytes / 2**30:.2f} GiB for the rollout engine, and {free / 2**30:.2f} are free "
            f"({error.strerror}); give the container more shared memory (docker: --ipc=host or --shm-size) or lower "
            "data.max_prompt_tokens"
        ) from error
    return torch.from_file(str(path), shared=True, size=num_bytes // dtype.itemsize, dtype=dtype).view(shape)


def memory_folder() -> str | None:
    """A folder in memory, where the system has one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
