"""The precision that decompositions run in, whatever the global settings say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

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
    with _float32_products("ieee", "highest"):
        yield


@contextmanager
def reduced_precision() -> Iterator[None]:
    """Run matrix products of float32 in TF32 on accelerators that have it."""
    with _float32_products("tf32", "high"):
        yield


@contextmanager
def _float32_products(cuda: str, legacy: str) -> Iterator[None]:
    # settings of torch 2.9 and later; to read them with the older functions is an error
    wanted = {
        backend: precision
        for backend, precision in (
            (torch.backends.cuda.matmul, cuda),
            (getattr(torch.backends.mkldnn, "matmul", None), "ieee"),
        )
        if hasattr(backend, "fp32_precision")
    }
    if wanted:
        before = {backend: backend.fp32_precision for backend in wanted}  # type: ignore[union-attr]
        try:
            for backend, precision in wanted.items():
                backend.fp32_precision = precision  # type: ignore[union-attr]
            yield
        finally:
            for backend, precision in before.items():
                backend.fp32_precision = precision  # type: ignore[union-attr]
        return
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(legacy)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


@cache
def has_native_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices of bfloat16 natively.

    Where it is emulated, as on most CPUs, it is up to 100 times slower than float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
