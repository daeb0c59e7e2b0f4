"""Memory that the trainer and a rollout engine in another process both see: of the host, and of a GPU."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from megalong.parallel.host_tensors import pin, unpin
from megalong.rollout.engine import RolloutEngineError
from megalong.rollout.transfer import Transport, pack_bucket

_PREFIX, _OWNER = "megalong-engine-", "owner"


class BucketRoom:
    """Where a trainer packs its buckets for an engine.

    By NCCL they leave on a stream of their own, while the next bucket is gathered, and all but the largest tensors go
    through one buffer for the time of an update. By CUDA IPC it stays, and the engine's workers map it once. (torch
    gives memory that it shared back when all who mapped it have let go of it, and it has looked: with a new buffer for
    each bucket, most of a copy of the weights was held after an update.)
    """

    def __init__(self, transport: Transport, folder: Path) -> None:
        self.transport, self.folder = transport, folder
        self._buffer: Tensor | None = None
        self._shared_place: tuple[str, tuple[Any, ...]] | None = None
        self._stream: Any = torch.cuda.Stream() if transport is Transport.nccl else None

    def pack(self, tensors: dict[str, Tensor], *, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 that hold the tensors, until the next call."""
        first, *others = tensors.values()
        if self._stream and not others and first.is_contiguous() and first.nbytes == num_bytes:
            packed = first.detach().view(-1).view(torch.uint8)  # without a second place for the largest of the model
        else:
            if self._stream:
                torch.cuda.current_stream().wait_stream(self._stream)  # until then the last bucket is in there
            packed = self._room(num_bytes, device=first.device)
            pack_bucket(tensors, packed)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        return packed

    def _room(self, num_bytes: int, *, device: torch.device) -> Tensor:
        """[num_bytes] uint8, whatever was there before."""
        if self.transport is Transport.file:
            return torch.empty(num_bytes, dtype=torch.uint8)
        if self._buffer is None or len(self._buffer) < num_bytes:
            self._buffer = self._shared_place = None
            if self.transport is Transport.ipc:
                torch.cuda.empty_cache()  # in memory of its own, not in a part of some that could be given back
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            if self.transport is Transport.ipc:
                uuid = str(torch.cuda.get_device_properties(device).uuid)
                self._shared_place = uuid, reduce_tensor(self._buffer)[1]
        return self._buffer[:num_bytes]

    def place(self, packed: Tensor) -> Any:
        """Where the engine's workers find the bytes (vllm_worker.BucketInfo.place), once they are written."""
        if self.transport is Transport.nccl:
            return None
        if self.transport is Transport.ipc:
            torch.cuda.current_stream().synchronize()
            return self._shared_place
        path = self.folder / "bucket"
        shared_tensor(path, (len(packed),), torch.uint8).copy_(packed)
        return str(path)

    def broadcast(self, packed: Tensor, group: Any) -> None:
        """By NCCL, from what pack gave last; whatever this thread waits for, the trainer's stream does not."""
        group.broadcast(packed, src=0, stream=self._stream)
        if self._buffer is None or packed.data_ptr() != self._buffer.data_ptr():
            self._stream.synchronize()  # its bytes are its owner's, who may let go of them

    def end_update(self) -> None:
        """By NCCL, the trainer's stream goes on behind the last bucket, and the buffer is given back."""
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._buffer = None


class MediaRoom:
    """Where embeddings wait for an engine: a file in memory that stays, so that its pages are made and pinned once."""

    def __init__(
        self, folder: Path, *, width: int, dtype: torch.dtype, let_go: Callable[[], object] = lambda: None
    ) -> None:
        """let_go: has the engine unmap the file, before one takes its place: there may not be memory for both."""
        self.folder, self.width, self.dtype, self.let_go = folder, width, dtype, let_go
        self.path = folder / "media0"  # the file; this one is not there
        self._whole: Tensor | None = None
        self._pinned, self._files = False, 0

    def __len__(self) -> int:
        """Rows that there is room for."""
        return 0 if self._whole is None else len(self._whole)

    def rows(self, count: int) -> Tensor:
        """The first `count` rows, [count, width], whatever was there before; the same memory until it is too small.

        Raises RolloutEngineError when there is no room for more, or the GPU's driver cannot pin it.
        """
        if len(self) < count:
            if len(self):
                self.let_go()
            self.close()
            self._files += 1
            self.path = self.folder / f"media{self._files}"  # never a name that the engine has mapped
            self._whole = shared_tensor(self.path, (count, self.width), self.dtype)
            if torch.cuda.is_available():
                num_bytes, code = self._whole.nbytes, pin(self._whole)
                if code:
                    self.close()
                    raise RolloutEngineError(
                        f"{self.path}: cudaHostRegister cannot pin {num_bytes / 2**30:.2f} GiB for the rollout engine "
                        f"(CUDA error {code}); lower data.max_prompt_tokens or grpo.batch_size"
                    )
                self._pinned = True
        return self._whole[:count]

    def write(self, embeds: Sequence[Tensor | None]) -> tuple[tuple[str, int, int] | None, list[int | None]]:
        """Put [n, width] tensors one after the other; one that comes several times once.

        Returns the file, its rows and their width, None without any; and the first row of each tensor, None for None.
        Those that were written to their place in rows() stay there.
        """
        parts = {id(part): part for part in embeds if part is not None}
        if not parts:
            return None, [None] * len(embeds)
        lengths = [len(part) for part in parts.values()]
        count = sum(lengths)
        places = self.rows(count).split(lengths)
        if any(part.data_ptr() != place.data_ptr() for part, place in zip(parts.values(), places, strict=True)):
            first, last = places[0].data_ptr(), places[0].data_ptr() + count * self.width * self.dtype.itemsize
            # One that is there, but elsewhere, would be overwritten before it is copied.
            held = [part.clone() if first <= part.data_ptr() < last else part for part in parts.values()]
            for part, place in zip(held, places, strict=True):
                place.copy_(part)
        first_rows = dict(zip(parts, accumulate(lengths, initial=0), strict=False))
        return (str(self.path), count, self.width), [first_rows.get(id(part)) for part in embeds]

    def close(self) -> None:
        """Let go of the memory and its file."""
        if self._pinned:
            unpin(self._whole)
        self._pinned, self._whole = False, None
        self.path.unlink(missing_ok=True)


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


def engine_folder() -> tuple[Path, IO[str]]:
    """A new folder in memory and what keeps it the caller's until it is closed.

    Folders that are nobody's any more are deleted: a trainer and an engine that were killed at once, as by a scheduler
    or a system out of memory, could not. Locks, not process ids: containers may share the memory, and count their own.
    """
    parent = memory_folder()
    for owner in parent.glob(f"{_PREFIX}*/{_OWNER}"):
        with suppress(OSError), owner.open() as file:  # another user's, or one that is deleted just now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    held = (folder / "new").open("w")
    with suppress(OSError):  # a file system without locks: nobody else gets one there
        fcntl.flock(held, fcntl.LOCK_EX)
    os.rename(folder / "new", folder / _OWNER)  # which is never seen without its lock
    return folder, held


def memory_folder() -> Path:
    """A folder in memory, where the system has one."""
    return Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
