"""The precision that decompositions run in, whatever the global settings say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """Run matrix products of float32 in float32: no TF32, no bfloat16.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with full_precision():
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.set_float32_matmul_precision("highest")
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
