"""Embeddings on disk: safetensors files that any split of a video over ranks can read.

A video has a folder, and in it files `<first>-<last>.safetensors` with some of its rows. Who wrote them does not
matter: a reader takes the rows it wants from whatever files hold them. A file says inside whose rows it has and what
their checksum is, and gets its name when it is written whole; one that does not keep its promises is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from megalong.records import tensor_checksums
from megalong.vision.settings import VisionSettings

FORMAT = "megalong embeddings 1"
PART_BYTES = 128 << 20
"""Most bytes of a file: a reader checks whole files, so it reads up to two of them more than it wants."""
ABANDONED_SECONDS = 3600
LOOKS = 64
GIB = 1 << 30
TENSOR = "embeds_ND"

_PART = re.compile(r"(\d+)-(\d+)\.safetensors")
_log = logging.getLogger(__name__)


class EmbeddingCacheError(RuntimeError):
    """The folder of the disk store cannot be read or written."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A file with rows [first, last) of a video."""

    path: Path
    first: int
    last: int


class _RefusedError(Exception):
    """Why a file is not what it should be."""


class DiskStore:
    """Rows [first, last) of a video's [N, D'] embeddings, by key. Several processes may use a folder at a time.

    The least recently used files make room when the folder holds budget_bytes; a file that is read is touched. Each
    process looks at the folder when it first writes, when it is full by its own count, and after every 1 / LOOKS of the
    budget that it has written: by so much, for each of the others, the folder may be over its budget. Methods raise
    EmbeddingCacheError when the folder cannot be used, or what must stay in it leaves no room.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, budget_bytes: int) -> None:
        self.folder = folder
        self.dtype = dtype
        self.budget_bytes = budget_bytes
        self.keep_since = math.inf  # files used at or after this time (of time.time()) are not deleted to make room
        self.refused: list[Path] = []  # files that were not what they should be, since the start
        self.num_evicted = 0
        self.bytes_written = 0
        self._bytes_seen: int | None = None  # in the folder, at the last look
        self._bytes_since = 0  # written by this process since then

    def holds(self, key: str, first: int, last: int) -> bool:
        """Whether files for all these rows are there; what is in them is looked at by read()."""
        return self._cover(key, first, last) is not None

    def read(self, key: str, first: int, last: int) -> Tensor | None:
        """Rows [first, last), [last - first, D'] on the CPU; None when not all of them are there.

        A file that is damaged or another key's is refused: logged, counted, deleted, and its rows are missing.
        Thread-safe.
        """
        without: set[Path] = set()
        while (cover := self._cover(key, first, last, without=without)) is not None:
            rows, at = [], first
            for part in cover:
                part_nD = self._read_part(part, key)
                if part_nD is None:
                    without.add(part.path)
                    break
                rows.append(part_nD[at - part.first : last - part.first])
                at = part.last
            else:
                return torch.cat(rows)
        return None

    def write(self, key: str, first: int, embeds_nD: Tensor) -> None:
        """Keep rows [first, first + n) of the video, unless they are there."""
        if self.holds(key, first, first + len(embeds_nD)):
            return
        if embeds_nD.nbytes > self.budget_bytes:
            raise EmbeddingCacheError(
                f"{embeds_nD.nbytes / GIB:.3f} GiB of embeddings of one video do not fit into {self.folder}: raise "
                f"video.cache_dir_gib (now {self.budget_bytes / GIB:.3f}) or set video.cache_dir=null"
            )
        row_bytes = embeds_nD[:1].nbytes
        for part_nD in embeds_nD.split(max(1, PART_BYTES // row_bytes)):
            self._write_part(key, first, part_nD)
            first += len(part_nD)

    def sweep(self) -> None:
        """Delete what writers that were killed left behind: unfinished files that nobody has touched for an hour."""
        for used, _, path in self._files("*.partial"):
            if time.time() - used > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Delete the least recently used files until so many bytes have room."""
        step = self.budget_bytes // LOOKS
        if self._bytes_seen is not None:
            self._bytes_since += num_bytes
            if self._bytes_since <= step and self._bytes_seen + self._bytes_since <= self.budget_bytes:
                return
        self.sweep()
        files = self._files()
        held = sum(size for _, size, _ in files)
        if held + num_bytes > self.budget_bytes:
            # Unfinished ones are another writer's until sweep() takes them.
            whole = [file for file in files if file[2].suffix == ".safetensors"]
            for used, size, path in sorted(whole):
                if held + num_bytes <= self.budget_bytes - step or used >= self.keep_since:
                    break
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise self._error(path, "deleted", error) from error
                held -= size
                self.num_evicted += 1
        if held + num_bytes > self.budget_bytes:
            raise EmbeddingCacheError(
                f"{self.folder} holds {held / GIB:.3f} GiB that may not be deleted, and {num_bytes / GIB:.3f} more do "
                f"not fit: raise video.cache_dir_gib (now {self.budget_bytes / GIB:.3f}) or take fewer videos"
            )
        self._bytes_seen, self._bytes_since = held, num_bytes

    def _files(self, pattern: str = "*.safetensors*") -> list[tuple[float, int, Path]]:
        """When it was last used, size and path of every file, unfinished ones, too."""
        found = []
        for path in self.folder.rglob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted, or just finished it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _folder_of(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / digest

    def _cover(self, key: str, first: int, last: int, *, without: Set[Path] = frozenset()) -> list[_Part] | None:
        """Files that hold rows [first, last) between them, in order, as few as possible; None: some row is in none."""
        folder = self._folder_of(key)
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return [] if first == last else None
        except OSError as error:
            raise self._error(folder, "read", error) from error
        found = [(folder / name, match) for name in names if (match := _PART.fullmatch(name))]
        parts = [_Part(path, int(match[1]), int(match[2])) for path, match in found if path not in without]
        cover: list[_Part] = []
        at = first
        while at < last:
            best = max((part for part in parts if part.first <= at), key=lambda part: part.last, default=None)
            if best is None or best.last <= at:
                return None
            cover.append(best)
            at = best.last
        return cover

    def _read_part(self, part: _Part, key: str) -> Tensor | None:
        """All rows of a file; None when it is refused, or gone."""
        try:
            embeds_nD = self._checked(part.path.read_bytes(), part, key)
            with contextlib.suppress(OSError):  # a cache that this process may only read
                os.utime(part.path)
            return embeds_nD
        except FileNotFoundError:  # another process has refused it, or made room
            return None
        except OSError as error:
            raise self._error(part.path, "read", error) from error
        except _RefusedError as refusal:
            self.refused.append(part.path)
            _log.warning("%s is refused, and its embeddings are made again: %s", part.path, refusal)
            # A cache that this process may only read (by its modes, or its mount) keeps it, and every reader refuses it
            # again: here its rows are missing either way.
            with contextlib.suppress(OSError):
                part.path.unlink()
            return None

    def _checked(self, content: bytes, part: _Part, key: str) -> Tensor:
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise _RefusedError(f"not a whole safetensors file ({error})") from error
        said = _metadata(content)
        expected = _describe(key, part.first, part.last)
        for name, value in expected.items():
            if said.get(name) != value:
                raise _RefusedError(f"its {name} is {said.get(name)!r}, expected {value!r}")
        embeds_nD = tensors.get(TENSOR)
        if embeds_nD is None or len(tensors) > 1:
            raise _RefusedError(f"it holds {sorted(tensors)}, expected {TENSOR} alone")
        if embeds_nD.ndim != 2 or len(embeds_nD) != part.last - part.first or embeds_nD.dtype != self.dtype:
            shape = f"{list(embeds_nD.shape)} {embeds_nD.dtype}"
            raise _RefusedError(f"its tensor is {shape}, expected {part.last - part.first} rows of {self.dtype}")
        checksum = str(int(tensor_checksums([embeds_nD])))
        if said.get("checksum") != checksum:
            raise _RefusedError(f"its checksum is {said.get('checksum')!r}, and {checksum!r} of its tensor")
        return embeds_nD

    def _write_part(self, key: str, first: int, embeds_nD: Tensor) -> None:
        last = first + len(embeds_nD)
        final = self._folder_of(key) / f"{first}-{last}.safetensors"
        # Of its own name: two processes may write the same rows at a time, and the last rename wins.
        partial = final.with_name(f"{final.name}.{uuid.uuid4().hex}.partial")
        tensors = {TENSOR: embeds_nD.cpu().contiguous()}
        said = {**_describe(key, first, last), "checksum": str(int(tensor_checksums(tensors.values())))}
        self._make_room(embeds_nD.nbytes)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=said)
            # Not flushed: what a power cut leaves under the final name has a wrong checksum or length.
            os.replace(partial, final)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise self._error(final, "written", error) from error
        self.bytes_written += embeds_nD.nbytes

    def _error(self, path: Path, what: str, error: Exception) -> EmbeddingCacheError:
        return EmbeddingCacheError(
            f"{path} cannot be {what} ({error}): make room in video.cache_dir={self.folder} and see that this user may "
            "use it, or set another video.cache_dir"
        )


def _describe(key: str, first: int, last: int) -> dict[str, str]:
    return {"format": FORMAT, "key": key, "rows": f"{first}-{last}"}


def _metadata(content: bytes) -> dict[str, Any]:
    """What a safetensors file, known to be whole, says about itself."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__") or {}


def open_disk_store(encoder: nn.Module | None, settings: VisionSettings) -> DiskStore | None:
    """None where embeddings are not kept, or in memory alone."""
    if encoder is None or not settings.frozen or settings.embed_folder is None:
        return None
    dtype = next(encoder.parameters()).dtype
    return DiskStore(Path(settings.embed_folder), dtype=dtype, budget_bytes=settings.embed_folder_bytes)
