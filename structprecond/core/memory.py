"""Keeping the memory of temporaries from going back and forth between process and system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# parameters of mallopt, and the largest value that glibc allows for the second
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 32 * 2**20
_MOST_KEPT = 512 * 2**20


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what a step frees, because the next step takes it again.

    By default, glibc takes large blocks from the system one by one, gives them back when they are
    freed, and gives back the end of its heap whenever 64 MB or less of it are free; every page that
    is taken anew costs a page fault. This makes it keep blocks of up to 32 MB, and 512 MB in all.
    Does nothing where the C library is another one, or when called again.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
