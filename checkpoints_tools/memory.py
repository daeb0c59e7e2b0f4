"""Makes the C library keep freed memory, so that one tensor after the other uses the same pages."""

from __future__ import annotations

import ctypes
import ctypes.util

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Ask glibc to serve large blocks from its heap and not to shrink it. Returns whether the C library understood.

    By default every tensor of a gigabyte gets fresh pages, which the kernel clears one by one: more work than copying.
    One heap for all threads, because those of other threads cannot hold blocks so large.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    return mallopt is not None and all(mallopt(setting, value) for setting, value in settings.items())
