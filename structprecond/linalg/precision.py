"""The precision that decompositions run in, whatever the global settings say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

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
def fast_float32() -> Iterator[None]:
    """Run matrix products of float32 as the settings say, with the fastest kernels of the CPU.

    Example:
        >>> A = torch.eye(2)
        >>> with fast_float32():
        ...     product = A @ A
    """
    on_cpu = {_cpu_backend(): _ALLOW_ONEDNN} if _onednn_keeps_float32() else {}
    with _set(on_cpu):
        yield


# torch hands float32 products to oneDNN only where oneDNN may use bfloat16 inside; it does so with
# AMX alone (brgemm_matmul_utils.cpp of oneDNN 3: "bf32")
_ALLOW_ONEDNN = "bf16"


@cache
def _onednn_keeps_float32() -> bool:
    """Whether products in oneDNN are as precise as others, and faster.

    MKL, which multiplies by default, runs kernels for AVX2 on all processors of AMD; those of
    oneDNN use AVX-512, which is twice as fast on Zen 5. Its results are checked, in case a version
    of it thinks otherwise about precision.
    """
    if not hasattr(torch.cpu, "get_capabilities") or not torch.backends.mkldnn.is_available():
        return False
    features = torch.cpu.get_capabilities()
    fitting = str(features.get("cpu_name")).startswith("AMD") and features.get("avx512_f")
    backend = _cpu_backend()
    if not fitting or features.get("amx_bf16") or not hasattr(backend, "fp32_precision"):
        return False
    # what the program has made its default is no matter here
    generator = torch.Generator("cpu").manual_seed(0)
    A, B = torch.randn(2, 4, 256, 256, generator=generator, dtype=torch.float32, device="cpu")
    with _set({backend: _ALLOW_ONEDNN}), torch.autocast("cpu", enabled=False):
        product = torch.matmul(A, B)
    exact = A.double() @ B.double()
    # float32 errs by 3e-7 here, bfloat16 by 3e-3
    return bool((product - exact).norm() < 1e-5 * exact.norm())


def _cpu_backend() -> Any:
    """Return what holds the CPU's setting; older versions of torch have none."""
    return getattr(torch.backends.mkldnn, "matmul", None)


@contextmanager
def _float32_products(cuda: str, legacy: str) -> Iterator[None]:
    # settings of torch 2.9 and later; to read them with the older functions is an error
    on_cpu = _ALLOW_ONEDNN if _onednn_keeps_float32() else "ieee"
    wanted = {
        backend: precision
        for backend, precision in (
            (torch.backends.cuda.matmul, cuda),
            (_cpu_backend(), on_cpu),
        )
        if hasattr(backend, "fp32_precision")
    }
    if wanted:
        with _set(wanted):
            yield
        return
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(legacy)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


@contextmanager
def _set(wanted: Mapping[Any, str]) -> Iterator[None]:
    """Set the precision of float32 for some backends, and put it back."""
    before = {backend: backend.fp32_precision for backend in wanted}
    try:
        for backend, precision in wanted.items():
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in before.items():
            backend.fp32_precision = precision


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
