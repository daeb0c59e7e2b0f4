"""A folder under construction: it gets its name once everything in it is on disk, and is removed otherwise."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints_tools.errors import ConvertError
from checkpoints_tools.signals import held_back


def check_target(out: Path, *, num_bytes: int) -> None:
    """Raise ConvertError when `out` exists or its disk has no room for num_bytes."""
    if out.exists() or out.is_symlink():
        raise ConvertError(f"--out {out}: exists already; give another folder or remove it")
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ConvertError(f"--out {out}: needs {num_bytes / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free")


@contextmanager
def building(out: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield `<out>.partial`, renamed to `out` at the end, and a function to call between two pieces of work.

    Any exception removes the folder instead. Ctrl-C and SIGTERM make the function raise KeyboardInterrupt, or the end
    of the body do; whatever comes later comes too late. What a killed run left is removed first. Raises ConvertError
    when another process is writing there, and for every OSError inside (a full disk, a file that goes away).
    """
    partial = out.with_name(out.name + ".partial")
    with held_back() as stop_if_asked:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            os.close(_locked(partial))
            shutil.rmtree(partial)
        partial.mkdir()
        lock = _locked(partial)
        try:
            yield partial, stop_if_asked
            stop_if_asked()
            _flush(partial, stop_if_asked)
            partial.rename(out)
            _flush_one(out.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                where = f"{error.filename}: " if error.filename else ""
                raise ConvertError(f"--out {out}: {where}{error.strerror or error}; nothing was left there") from error
            raise
        finally:
            os.close(lock)


def _locked(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConvertError(f"{folder}: another conversion is writing there") from error
    return descriptor


def _flush(folder: Path, stop_if_asked: Callable[[], None]) -> None:
    for path in [folder, *folder.rglob("*")]:
        _flush_one(path)
        stop_if_asked()


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
