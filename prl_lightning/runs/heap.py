"""The heap of a process that trains on a CPU: memory that is freed stays with the process."""

from __future__ import annotations

import ctypes
import os
import sys

# Of glibc's malloc.h and Linux' mman.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MADV_DONTNEED = 4
# Of the environment: MALLOC_TRIM_THRESHOLD_, or glibc.malloc.trim_threshold in GLIBC_TUNABLES.
SETTINGS = ("trim_threshold", "mmap_max", "mmap_threshold")


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, as torch's allocator does on a GPU.

    By default it returns a large tensor to the system at once, and the end of its heap with the
    activations of each micro-batch. The next ones then cost a page fault every 4 KiB, which takes
    longer than to compute them (docs/speed.md). The process keeps what it needed at its peak. It
    has one heap for everything, whose gaps add a little to that.

    Returns:
        Whether it was set: not with another C library, or where the environment sets malloc.
    """
    own = [name for name in os.environ if name.startswith("MALLOC_")]
    named = " ".join([*own, os.environ.get("GLIBC_TUNABLES", "")]).lower()
    if sys.platform != "linux" or any(name in named for name in SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])


def drop_pages(address: int, size: int) -> None:
    """Free memory that stays allocated: it reads as zeros, and takes a page when it is used again.

    Args:
        address: where it begins. Nothing happens to a page that is not wholly inside.
        size: in bytes.
    """
    if sys.platform != "linux":  # elsewhere, the old values may come back
        return
    page = os.sysconf("SC_PAGESIZE")
    first = -(-address // page) * page
    pages = max(0, address + size - first) // page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(pages * page), MADV_DONTNEED)
