"""The precision of decompositions and products, whatever the global settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from structprecond.errors import StructPrecondError
from structprecond.linalg.settings import LOCK, Setting, Wishes, enter, has_separate_settings, leave

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Computing:
    """A context manager or decorator that sets the precision of the code inside.

    torch's settings apply to the whole process. If several threads are inside, the most precise
    request counts: no thread computes in less than it asked for, but TF32 may stay unused. The last
    thread to leave restores the settings.

    Args:
        wishes: Returns the requested settings.
        autocast: Whether `torch.autocast` may stay on. Default: False.
        forget: Whether to clear the cache of autocast afterwards, if autocast was on. It holds
            casts of parameters and does not notice changes in place. Default: False.
    """

    __slots__ = ("_autocast", "_entered", "_forget", "_guard", "_make_wishes")

    def __init__(
        self, wishes: Callable[[], Wishes], autocast: bool = False, forget: bool = False
    ) -> None:
        self._make_wishes, self._autocast, self._forget = wishes, autocast, forget
        self._entered: tuple[int, Wishes] | None = None
        self._guard: Any = None

    def __enter__(self) -> None:
        if self._entered is not None:
            raise StructPrecondError(
                "This context has been entered already. Make a new one for each `with`, as in "
                "`with full_precision():`."
            )
        wishes = self._make_wishes()
        self._entered = enter(wishes), wishes
        # one guard for all device types
        if not self._autocast and torch._C._is_any_autocast_enabled():
            self._guard = torch._C._DisableAutocast()
            self._guard.__enter__()

    def __exit__(self, *exception: object) -> None:
        entered, guard = self._entered, self._guard
        self._entered = self._guard = None
        try:
            if guard is not None:
                guard.__exit__(*exception)
                if self._forget:
                    torch.clear_autocast_cache()
        finally:
            if entered is not None:
                leave(*entered)

    def __call__(self, function: _Function) -> _Function:
        """Run every call of a function in a new context."""

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with Computing(self._make_wishes, self._autocast, self._forget):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]


def full_precision() -> Computing:
    """Run float32 matrix products in float32: no TF32, no bfloat16, no autocast.

    Other threads cannot lower the precision meanwhile, not even with `reduced_precision`.

    Example:
        >>> A = torch.eye(2)
        >>> with full_precision():
        ...     product = A @ A
    """
    return Computing(_full)


def reduced_precision() -> Computing:
    """Run float32 matrix products in TF32 where available, without autocast.

    They run in float32 while another thread needs that.
    """
    return Computing(_reduced)


def fast_float32() -> Computing:
    """Run float32 matrix products as the settings say, with the fastest kernels of the CPU.

    Example:
        >>> A = torch.eye(2)
        >>> with fast_float32():
        ...     product = A @ A
    """
    return Computing(_fast, autocast=True)


def step_precision() -> Computing:
    """Run a step as in `fast_float32`, but without autocast, whose cached casts are cleared."""
    return Computing(_fast, forget=True)


def without_autocast() -> Computing:
    """Switch autocast off for code that changes parameters, and leave the settings alone."""
    return Computing(dict, forget=True)


# torch gives float32 products to oneDNN only if oneDNN may use bfloat16 inside, which it does with
# AMX alone (oneDNN 3, brgemm_matmul_utils.cpp: "bf32")
_ALLOW_ONEDNN = "bf16"
_SEPARATE = has_separate_settings()
_LEGACY = Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
_CUDA, _CPU = map(Setting.of_products, ("cuda", "mkldnn")) if _SEPARATE else (_LEGACY, _LEGACY)


def _full() -> Wishes:
    return {_CUDA: "ieee", _CPU: _on_cpu()} if _SEPARATE else {_LEGACY: "highest"}


def _reduced() -> Wishes:
    return {_CUDA: "tf32", _CPU: _on_cpu()} if _SEPARATE else {_LEGACY: "high"}


def _fast() -> Wishes:
    return {_CPU: _ALLOW_ONEDNN} if _onednn_keeps_float32() else {}


def _on_cpu() -> str:
    return _ALLOW_ONEDNN if _onednn_keeps_float32() else "ieee"


@cache
def _onednn_keeps_float32() -> bool:
    """Return whether products by oneDNN are as precise as others, and faster.

    MKL, the default, runs AVX2 kernels on all AMD processors. oneDNN uses AVX-512, which is twice
    as fast on Zen 5. Its results are checked, in case a version of it lowers the precision.
    """
    # one thread checks, and no other thread switches settings meanwhile
    with LOCK:
        return _checked()


@cache
def _checked() -> bool:
    if not hasattr(torch.cpu, "get_capabilities") or not torch.backends.mkldnn.is_available():
        return False
    features = torch.cpu.get_capabilities()
    fitting = str(features.get("cpu_name")).startswith("AMD") and features.get("avx512_f")
    if not fitting or features.get("amx_bf16") or not _SEPARATE:
        return False
    # independent of the default dtype and device
    generator = torch.Generator("cpu").manual_seed(0)
    A, B = torch.randn(2, 4, 256, 256, generator=generator, dtype=torch.float32, device="cpu")
    with Computing(lambda: {_CPU: _ALLOW_ONEDNN}):
        product = torch.matmul(A, B)
    exact = A.double() @ B.double()
    # float32 errs by 3e-7 here, bfloat16 by 3e-3
    return bool((product - exact).norm() < 1e-5 * exact.norm())


@cache
def has_native_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices natively.

    Emulation, as on most CPUs, is up to 100 times slower than float32.
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
