"""The precision that decompositions run in, whatever the global settings say."""

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
    """A context, or a decorator, for what is computed inside.

    Settings of precision are those of the whole process. So the most precise one counts of what the
    threads want that are inside of such a context: none computes in less than it asked for, but
    TF32 may be left unused. The last one to leave puts the settings back.

    Args:
        wishes: Returns the settings to have inside.
        autocast: Whether `torch.autocast` stays as it is inside; else it is off.
        forget: Whether to clear the cache of autocast afterwards, if autocast was on: it holds
            casts of parameters, and does not notice that these are changed in place.
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
                "This context has been entered already. Make one for each `with`, for example by "
                "`with full_precision():`."
            )
        wishes = self._make_wishes()
        self._entered = enter(wishes), wishes
        # one guard for all types of devices
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
        """Let a function compute inside of a context of its own, at every call."""

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with Computing(self._make_wishes, self._autocast, self._forget):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]


def full_precision() -> Computing:
    """Run matrix products of float32 in float32: no TF32, no bfloat16, no autocast.

    While a thread is inside, no other thread lowers the precision, also with `reduced_precision`.

    Example:
        >>> A = torch.eye(2)
        >>> with full_precision():
        ...     product = A @ A
    """
    return Computing(_full)


def reduced_precision() -> Computing:
    """Run matrix products of float32 in TF32 on accelerators that have it; without autocast.

    They run in float32 as long as another thread needs that.
    """
    return Computing(_reduced)


def fast_float32() -> Computing:
    """Run matrix products of float32 as the settings say, with the fastest kernels of the CPU.

    Example:
        >>> A = torch.eye(2)
        >>> with fast_float32():
        ...     product = A @ A
    """
    return Computing(_fast, autocast=True)


def step_precision() -> Computing:
    """Do what `fast_float32` does for a step, which autocast does not touch.

    Parameters are changed inside: what autocast keeps of them is forgotten.
    """
    return Computing(_fast, forget=True)


def without_autocast() -> Computing:
    """Leave the settings alone, but switch off autocast for what changes parameters."""
    return Computing(dict, forget=True)


# torch hands float32 products to oneDNN only where oneDNN may use bfloat16 inside; it does so with
# AMX alone (brgemm_matmul_utils.cpp of oneDNN 3: "bf32")
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
    """Whether products in oneDNN are as precise as others, and faster.

    MKL, which multiplies by default, runs kernels for AVX2 on all processors of AMD; those of
    oneDNN use AVX-512, which is twice as fast on Zen 5. Its results are checked, in case a version
    of it thinks otherwise about precision.
    """
    # one thread checks, while no other one computes in a setting that it wants
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
    # what the program has made its default is no matter here
    generator = torch.Generator("cpu").manual_seed(0)
    A, B = torch.randn(2, 4, 256, 256, generator=generator, dtype=torch.float32, device="cpu")
    with Computing(lambda: {_CPU: _ALLOW_ONEDNN}):
        product = torch.matmul(A, B)
    exact = A.double() @ B.double()
    # float32 errs by 3e-7 here, bfloat16 by 3e-3
    return bool((product - exact).norm() < 1e-5 * exact.norm())


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
