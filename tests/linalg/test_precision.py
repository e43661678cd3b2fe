"""Precision settings: as requested inside contexts, restored outside, never less precise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from structprecond import AdamW, GradientError
from structprecond.linalg import precision
from structprecond.linalg.precision import fast_float32, full_precision, reduced_precision
from structprecond.linalg.settings import Setting

Context = Callable[[], AbstractContextManager[None]]
ZEN = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_bf16": False}


def _setting(*values: str) -> Setting:
    """Return a fake setting, so that the real ones do not change."""
    written = list(values)
    return Setting(lambda: written[-1], written.append)


def _forget_the_check() -> None:
    precision._onednn_keeps_float32.cache_clear()
    precision._checked.cache_clear()


@pytest.fixture
def asked_anew() -> Iterator[None]:
    _forget_the_check()
    yield
    _forget_the_check()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_precision_is_set_for_every_backend_and_put_back(
    onednn: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, cpu = _setting("tf32"), _setting("none")
    monkeypatch.setattr(precision, "_onednn_keeps_float32", lambda: onednn)
    monkeypatch.setattr(precision, "_SEPARATE", True)
    monkeypatch.setattr(precision, "_CUDA", cuda)
    monkeypatch.setattr(precision, "_CPU", cpu)
    on_cpu = "bf16" if onednn else "ieee"
    cases: list[tuple[Context, tuple[str, str]]] = [
        (full_precision, ("ieee", on_cpu)),
        (reduced_precision, ("tf32", on_cpu)),
        (fast_float32, ("tf32", "bf16" if onednn else "none")),
    ]
    for context, inside in cases:
        try:
            with context():
                assert (cuda.read(), cpu.read()) == inside
                if fails:
                    raise LinAlgError
        except LinAlgError:
            assert fails
        assert (cuda.read(), cpu.read()) == ("tf32", "none")


def test_older_torch_has_one_setting_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = ["medium"]
    monkeypatch.setattr(precision, "_onednn_keeps_float32", lambda: False)
    monkeypatch.setattr(precision, "_SEPARATE", False)
    monkeypatch.setattr(precision, "_LEGACY", Setting(lambda: setting[-1], setting.append))
    with full_precision(), reduced_precision():
        pass
    assert setting == ["medium", "highest", "high", "highest", "medium"]


@pytest.mark.parametrize("context", [fast_float32, full_precision, reduced_precision])
@pytest.mark.parametrize("shape", [(1, 1024, 256), (3, 256, 1024), (50, 64, 64), (8, 3, 200)])
def test_products_on_the_cpu_keep_the_precision_of_float32(
    context: Context, shape: tuple[int, int, int]
) -> None:
    A = torch.randn(shape)
    with context():
        product, sums = A.mT @ A, torch.baddbmm(A, A, A.mT @ A)
    exact = A.double().mT @ A.double()
    assert (product - exact).norm() < 1e-6 * exact.norm()
    exact = A.double() + A.double() @ exact
    assert (sums - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize(
    "features",
    [
        {},
        {**ZEN, "cpu_name": "Intel(R) Xeon(R)"},
        {**ZEN, "avx512_f": False},
        {**ZEN, "amx_bf16": True},
    ],
)
@pytest.mark.usefixtures("asked_anew")
def test_onednn_is_chosen_only_where_it_is_known_to_be_better(
    features: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert not precision._onednn_keeps_float32()


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.usefixtures("asked_anew")
def test_onednn_is_not_chosen_if_it_rounds(rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.bmm(A.bfloat16(), B.bfloat16()).float() if rounds else torch.bmm(A, B)

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(precision, "_SEPARATE", True)
    monkeypatch.setattr(precision, "_CPU", _setting("none"))
    monkeypatch.setattr(torch, "matmul", product)
    assert precision._onednn_keeps_float32() is not rounds


def test_a_step_leaves_the_settings_alone_also_when_it_fails() -> None:
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(backend, "fp32_precision", None)
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], nonfinite="raise")
    p.grad = torch.ones(3)
    optimizer.step()
    assert getattr(backend, "fp32_precision", None) == before
    p.grad = torch.full((3,), torch.nan)
    with pytest.raises(GradientError):
        optimizer.step()
    assert getattr(backend, "fp32_precision", None) == before


@pytest.mark.parametrize("default", ["device", "dtype", "autocast"])
@pytest.mark.usefixtures("asked_anew")
def test_the_check_looks_at_float32_on_the_cpu_whatever_the_defaults(
    default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(precision, "_SEPARATE", True)
    monkeypatch.setattr(precision, "_CPU", _setting("none"))
    seen = []
    matmul = torch.matmul

    def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        seen.append((A.dtype, A.device.type))
        return matmul(A, B)

    monkeypatch.setattr(torch, "matmul", product)
    contexts: dict[str, AbstractContextManager[object]] = {
        "device": torch.device("meta"),
        "dtype": _default_dtype(torch.float64),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with contexts[default]:
        assert precision._onednn_keeps_float32()
    assert seen == [(torch.float32, "cpu")]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)
