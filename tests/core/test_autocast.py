"""Steps under `torch.autocast`, which affects closures but not the steps themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import SAM, SOAP, AdamW, CapturedStep, SIRFShampoo, StructuredOptimizer
from structprecond.linalg import (
    eigh,
    matrix_inverse_root,
    newton_schulz,
    off_diagonal_ratio,
    orthogonal_iteration,
    polar_factor,
    rayleigh_quotients,
    refresh_eigenbasis,
)
from structprecond.linalg.precision import fast_float32, full_precision, reduced_precision
from structprecond.linalg.qr import orthogonal_factor
from structprecond.testing.table import STRATEGIES
from tests.every_strategy import MAKERS
from tests.helpers import same_bits, set_grads, snapshot, values

Make = Callable[..., Any]
OPTIMIZERS: dict[str, Make] = {
    **MAKERS,
    **{f"{name} of the table": contract.make for name, contract in STRATEGIES.items()},
    "SIRF with a triangular structure": lambda model: SIRFShampoo(
        model, batch_size=4, T=1, structures="triltoeplitz"
    ),
}


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 5))


def _loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(4, 2, 3, 3, generator=generator)).square().mean()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_are_the_same_to_the_bit(make: Make) -> None:
    snapshots = []
    for context in (nullcontext(), _autocast()):
        model = _model()
        with context:
            optimizer = make(model)
            for step in range(6):
                optimizer.batch_size = 4
                set_grads([*model.parameters()], step)
                optimizer.step()
        snapshots.append(snapshot(model, optimizer))
        del snapshots[-1]["groups"]  # has parameters of its own
    assert same_bits(*snapshots)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("make", [SOAP, _sgd])
def test_both_steps_of_sam_are_the_same_to_the_bit(make: Make) -> None:
    results = []
    for context in (nullcontext(), _autocast()):
        model = _model()
        sam = SAM(None, make(model))
        perturbed = []
        for step in range(4):
            set_grads([*model.parameters()], 2 * step)
            with context:
                sam.first_step()
            perturbed += values(model)
            set_grads([*model.parameters()], 2 * step + 1)
            with context:
                sam.second_step()
        results.append(perturbed + values(model))
    assert same_bits(*results)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, lambda base: SAM(None, base)])
@pytest.mark.parametrize("enabled", [False, True])
def test_closures_run_under_the_autocast_of_the_user(wrap: Make, enabled: bool) -> None:
    model = _model()
    optimizer = wrap(SOAP(model, precondition_frequency=1))
    seen: list[tuple[bool, torch.dtype]] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = _loss(model, len(seen))
        seen.append((torch.is_autocast_enabled("cpu"), model(torch.ones(1, 2, 3, 3)).dtype))
        loss.backward()
        return float(loss.detach())

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        for _ in range(3):
            optimizer.step(closure)
            assert torch.is_autocast_enabled("cpu") is enabled
    assert set(seen) == {(enabled, torch.bfloat16 if enabled else torch.float32)}
    assert not torch.is_autocast_enabled("cpu")


def test_a_step_that_fails_leaves_autocast_on() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], nonfinite="raise")
    p.grad = torch.full((3,), torch.nan)
    with _autocast():
        with pytest.raises(Exception, match="not finite"):
            optimizer.step()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("way", ["step", "captured", "sam by hand", "sam", "restored"])
def test_the_next_forward_sees_the_new_parameters_in_the_same_autocast(way: str) -> None:
    # autocast caches the parameters that it has cast, and does not notice changes
    model = nn.Linear(3, 1, bias=False)
    base = SOAP(model, lr=0.5, nonfinite="ignore", skip_first=False)
    sam = SAM(None, base, rho=2.0)
    x = torch.ones(1, 3)

    def closure() -> float:
        loss = model(x).square().sum()
        loss.backward()
        return float(loss.detach())

    def stale() -> bool:
        return not torch.equal(
            model(x).float(), (x.bfloat16() @ model.weight.bfloat16().mT).float()
        )

    with _autocast():
        closure()
        if way == "step":
            base.step()
        elif way == "captured":
            CapturedStep(base)()
        elif way == "sam":
            sam.step(closure)
        else:
            sam.first_step()
            assert not stale()
            sam.restore() if way == "restored" else sam.second_step()
        assert not stale()


def test_captured_steps_are_the_same_to_the_bit() -> None:
    results = []
    for context in (nullcontext(), _autocast()):
        model = _model()
        step = CapturedStep(SOAP(model, precondition_frequency=1, nonfinite="ignore"))
        with context:
            for i in range(4):
                set_grads([*model.parameters()], i)
                step()
        results.append(values(model))
    assert same_bits(*results)


def test_a_strategy_may_switch_autocast_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = StructuredOptimizer.plan

    def checked(optimizer: StructuredOptimizer) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        with _autocast():
            seen.append(torch.is_autocast_enabled("cpu"))
        seen.append(torch.is_autocast_enabled("cpu"))
        return step(optimizer)

    monkeypatch.setattr(StructuredOptimizer, "plan", checked)
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    p.grad = torch.ones(3)
    with _autocast():
        optimizer.step()
    assert seen == [False, True, False]


# --- decompositions ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 520])
def test_decompositions_are_the_same_to_the_bit(size: int) -> None:
    X = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    A = X @ X.mT / size + torch.eye(size)
    Q = orthogonal_factor(X)
    small, other = A[:, :6, :6], Q[:, :6, :6].contiguous()
    functions: list[Callable[[], Any]] = [
        lambda: orthogonal_factor(X),
        lambda: orthogonal_iteration(A, Q),
        lambda: rayleigh_quotients(A, Q),
        lambda: refresh_eigenbasis(A, Q),
        lambda: off_diagonal_ratio(A, Q),
        lambda: eigh(small),
        lambda: polar_factor(small),
        lambda: [newton_schulz(X, steps=2, precision=p) for p in ("highest", "high", "medium")],
        lambda: newton_schulz(X[:, :3], steps=5),
        lambda: matrix_inverse_root(small, 2, 1e-3),
        lambda: matrix_inverse_root(small, 4, 1e-3, "coupled_newton"),
        lambda: matrix_inverse_root(small, 4, 1e-3, "newton_db"),
        lambda: orthogonal_iteration(small.double(), other.double()),
    ]
    for function in functions:
        expected = function()
        with _autocast():
            assert same_bits(function(), expected)
            assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("context", "dtype"),
    [
        (full_precision, torch.float32),
        (reduced_precision, torch.float32),
        (fast_float32, torch.bfloat16),
    ],
)
def test_autocast_is_off_in_contexts_that_promise_a_precision(
    context: Callable[[], AbstractContextManager[None]], dtype: torch.dtype
) -> None:
    A = torch.eye(3)
    with _autocast():
        with context():
            assert (A @ A).dtype == dtype
        assert (A @ A).dtype == torch.bfloat16
