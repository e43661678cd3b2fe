"""Keeping the memory of temporaries from going back and forth between process and system."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

import torch

from structprecond.errors import StructPrecondError

# parameters of mallopt
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# the largest blocks to keep; older versions of glibc allow no more than the second
_LARGEST_BLOCKS = 256 * 2**20, 32 * 2**20
_MOST_KEPT = 512 * 2**20
# by which users make settings of their own
_VARIABLES = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"
# by which users say that nothing is to be set
_SWITCH = "STRUCTPRECOND_KEEP_FREED_MEMORY"


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep what a step frees, because the next step takes it again.

    By default, glibc takes large blocks from the system one by one, gives them back when they are
    freed, and gives back the end of its heap as soon as more than a threshold of it is free, which
    is 64 MB at most; every page that is taken anew costs a page fault. This makes it keep blocks of
    up to 256 MB, and up to 512 MB at the end of the heap, in the whole process. Does nothing where
    the C library is another one, where the environment has settings of the user's or sets
    `STRUCTPRECOND_KEEP_FREED_MEMORY` to 0, or when called again.

    Args:
        device: Where steps take memory; on other devices than the CPU, it is not glibc's.

    Raises:
        StructPrecondError: If `STRUCTPRECOND_KEEP_FREED_MEMORY` is neither 0 nor 1.
    """
    if device.type == "cpu":
        _set_thresholds()


@cache
def _set_thresholds() -> None:
    switch = os.environ.get(_SWITCH, "1")
    if switch not in ("0", "1"):
        raise StructPrecondError(
            f"The environment variable {_SWITCH} is {switch!r}. Set it to 0 to leave the C "
            "library's settings alone, or to 1, the default."
        )
    if switch == "0":
        return
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # either setting ends glibc's own adaptation, so the second is made only beside the first
    if any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_BLOCKS):
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
