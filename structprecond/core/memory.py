"""Makes glibc keep the memory of temporaries, which saves page faults."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

import torch

from structprecond.errors import StructPrecondError

# parameters of mallopt
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# the largest blocks to keep; older versions of glibc allow only the second value
_LARGEST_BLOCKS = 256 * 2**20, 32 * 2**20
_MOST_KEPT = 512 * 2**20
# variables with the user's own settings, which take precedence
_VARIABLES = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"
# the variable that turns this off
_SWITCH = "STRUCTPRECOND_KEEP_FREED_MEMORY"


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc keep the memory that a step frees, for the next step.

    By default, glibc returns freed large blocks to the system, and the end of its heap once the
    free part exceeds a threshold of at most 64 MB. Every page that a step takes again then costs a
    page fault. This function makes glibc keep blocks of up to 256 MB, and up to 512 MB at the end
    of the heap, in the whole process. It does nothing with another C library, with the user's own
    settings in the environment, with `STRUCTPRECOND_KEEP_FREED_MEMORY=0`, or when called again.

    Args:
        device: The device of the parameters; only the CPU uses glibc's memory.

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
            f"The environment variable {_SWITCH} is {switch!r}. Set it to 0 to keep the C "
            "library's settings, or to 1, the default."
        )
    if switch == "0":
        return
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # either setting stops glibc's own adaptation, so make the second only if the first works
    if any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_BLOCKS):
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
