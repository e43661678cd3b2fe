"""Keeping the memory of temporaries from going back and forth between process and system."""

from __future__ import annotations

from functools import cache

import torch

# the largest block by which glibc's malloc adapts its thresholds
_LARGEST = 32 * 2**20 - 2**14


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what a step frees, because the next step takes it again.

    glibc gives freed memory above a threshold back to the system, and every page that is taken anew
    costs a page fault. The threshold adapts to the largest block freed so far: freeing one of 32 MB
    once, which is never touched, raises it to its maximum of 64 MB. Measured on 2 cores, a step of
    SIRF-Shampoo on 28 matrices of a transformer takes 8 to 35 % less time with structured factors
    and 2 % less with dense ones. Does nothing where the C library is another one,
    or when called again.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
