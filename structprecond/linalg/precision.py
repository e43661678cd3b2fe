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
        >>> A = torch.eye(2)
        >>> with full_precision():
        ...     product = A @ A
    """
    # settings of torch 2.9 and later; to read them with the older functions is an error
    settings = [
        backend
        for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
        if hasattr(backend, "fp32_precision")
    ]
    if settings:
        before = [backend.fp32_precision for backend in settings]  # type: ignore[union-attr]
        try:
            for backend in settings:
                backend.fp32_precision = "ieee"  # type: ignore[union-attr]
            yield
        finally:
            for backend, precision in zip(settings, before, strict=True):
                backend.fp32_precision = precision  # type: ignore[union-attr]
        return
    legacy = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
