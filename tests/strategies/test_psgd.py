"""PSGD-Kron against the published code and its formulas for one tensor, given the same noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    HyperparameterError,
    PSGDKron,
    PSGDKronStrategy,
    StepContext,
    StructureError,
    describe,
)
from structprecond.linalg import spectral_norm_bound
from structprecond.strategies import psgd
from tests import golden
from tests.helpers import same_bits, set_grads

Array = np.ndarray[Any, Any]
LR, RATE, BETA, MOMENTUM, DAMPING = 0.05, 0.1, 0.9, 0.8, 1e-3


def bound(A: Array) -> float:
    """Return the lower bound of the spectral norm: three products from the longest row."""
    v = A[np.argmax(np.linalg.norm(A, axis=1))]
    for _ in range(3):
        v = A @ (v / np.linalg.norm(v))
    return float(np.linalg.norm(v))


def unfold(tensor: Array, axis: int) -> Array:
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def times(tensor: Array, matrix: Array, axis: int) -> Array:
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)


class Oracle:
    """The rule for one tensor, with dense matrices; diagonal factors have zeros elsewhere."""

    def __init__(self, p: Array, first: Array, diagonal: tuple[bool, ...]) -> None:
        self.p, self.diagonal, self.t = p, diagonal, 0
        scale = (np.mean(first**4) + DAMPING**4) ** (-1 / 8)
        self.Q = [scale ** (1 / p.ndim) * np.eye(d) for d in p.shape]
        self.L = [0.0] * p.ndim
        self.m = np.zeros_like(p)

    def precondition(self, tensor: Array) -> Array:
        for axis, Q in enumerate(self.Q):
            tensor = times(tensor, Q.T @ Q, axis)
        return tensor

    def fit(self, G: Array, V: Array) -> None:
        whitened = self.precondition(G + (DAMPING + np.finfo(float).eps * abs(G)) * V)
        for axis, diagonal in enumerate(self.diagonal):
            X = unfold(whitened, axis)
            T, t = X @ X.T, G.size / G.shape[axis]
            if diagonal:
                T = np.diag(np.diag(T))
            ell = (np.diag(T).max() if diagonal else bound(T)) + t
            self.L[axis] = max(BETA * self.L[axis] + (1 - BETA) * ell, ell)
            Q = self.Q[axis]
            Q = Q - RATE / self.L[axis] * (T @ Q - t * Q)
            if not diagonal:
                R = Q.T - Q
                if np.abs(R).max() > 0:
                    R = R / bound(R)
                a = 1 / 8
                if np.trace(R @ R @ Q) < 0:
                    a = min(a, -np.trace(R @ Q) / np.trace(R @ R @ Q))
                Q = Q + a * (R @ Q + a / 2 * R @ R @ Q)
            self.Q[axis] = Q

    def balance(self) -> None:
        largest = [np.abs(Q).max() for Q in self.Q]
        common = math.prod(largest) ** (1 / len(largest))
        self.Q = [Q * common / norm for Q, norm in zip(self.Q, largest, strict=True)]

    def step(self, G: Array) -> None:
        self.t += 1
        beta = min((self.t - 1) / self.t, MOMENTUM)
        self.m = beta * self.m + (1 - beta) * G
        D = self.precondition(self.m)
        D = D * min(1.0, 2.0 / np.sqrt(np.mean(D**2)))
        self.p = self.p - LR * np.clip(D, -10, 10)


SETTINGS: dict[str, Any] = {
    "lr": LR,
    "momentum": MOMENTUM,
    "preconditioner_lr": RATE,
    "bound_beta": BETA,
    "damping": DAMPING,
}


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The noise of each update."""
    drawn: list[Tensor] = []

    def randn(ctx: StepContext, *dims: int) -> Tensor:
        drawn.append(torch.randn(len(ctx.seeds), *dims, dtype=ctx.dtype))
        return drawn[-1]

    monkeypatch.setattr(StepContext, "randn", randn)
    return drawn


def skew(optimizer: PSGDKron, p: nn.Parameter, oracle: Oracle) -> None:
    """Add the same strictly triangular matrices to the dense factors of both."""
    for axis, (Q, diagonal) in enumerate(zip(oracle.Q, oracle.diagonal, strict=True)):
        if not diagonal:
            added = np.abs(Q).max() * np.triu(np.ones_like(Q), 1)
            Q += added
            optimizer.state[p][f"factors.{axis}.mat"].add_(torch.from_numpy(added))


@pytest.mark.parametrize("name", golden.names("psgd_"))
def test_reproduces_the_published_trajectory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their noise, exact norms, and factors balanced at fixed updates: the rest is theirs."""
    recorded = golden.load(name)
    model = recorded.model()
    shapes = {tuple(p.shape): name for name, p in model.named_parameters()}

    def randn(ctx: StepContext, *dims: int) -> Tensor:
        assert isinstance(ctx.t, int)
        return torch.from_numpy(recorded.arrays[f"noise|{ctx.t - 1}|{shapes[dims]}"]).unsqueeze(0)

    monkeypatch.setattr(StepContext, "randn", randn)
    monkeypatch.setattr(psgd, "spectral_norm_bound", lambda A: torch.linalg.matrix_norm(A, 2))
    monkeypatch.setattr(psgd, "_BALANCED_EVERY", recorded.meta["balanced_every"])
    optimizer = PSGDKron(model.parameters(), **recorded.kwargs)
    assert recorded.replay(model, optimizer) < 1e-9


@pytest.mark.parametrize(
    ("shape", "structures", "diagonal"),
    [
        ((4, 5), "dense", (False, False)),
        ((4, 5), "diagonal", (True, True)),
        ((4, 6), ("diagonal", "dense"), (True, False)),
        ((3, 4, 5), "dense", (False, False, False)),
        ((3, 4, 2), ("dense", "diagonal", "dense"), (False, True, False)),
        ((6,), "auto", (True,)),
    ],
)
def test_stacked_rows_follow_the_formulas(
    shape: tuple[int, ...],
    structures: Any,
    diagonal: tuple[bool, ...],
    noise: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(psgd, "_BALANCED_EVERY", 4)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(2)]
    given = structures if isinstance(structures, str) else {len(shape): structures}
    optimizer = PSGDKron(params, structures=given, **SETTINGS)
    oracles: list[Oracle] = []
    for step in range(1, 11):
        grads = []
        for i, p in enumerate(params):
            # correlated entries and an outlier, so that factors turn and directions are capped
            grad = torch.randn(shape, dtype=torch.float64).cumsum(0) * 10.0 ** (-2 * i)
            grads.append((grad * (1e3 if step == 6 else 1.0)).numpy())
            p.grad = torch.from_numpy(grads[i].copy())
        if not oracles:
            pairs = zip(params, grads, strict=True)
            oracles = [Oracle(p.detach().numpy().copy(), g, diagonal) for p, g in pairs]
        if step == 5:
            # far from symmetric, so that turns have their largest angle
            for p, oracle in zip(params, oracles, strict=True):
                skew(optimizer, p, oracle)
        optimizer.step()
        for i, (p, oracle) in enumerate(zip(params, oracles, strict=True)):
            oracle.fit(grads[i], noise[-1][i].numpy())
            if step % 4 == 0 and len(shape) > 1:
                oracle.balance()
            oracle.step(grads[i])
            assert np.linalg.norm(p.detach().numpy() - oracle.p) < 1e-9 * np.linalg.norm(oracle.p)
    for i, p in enumerate(params):
        for axis, Q in enumerate(oracles[i].Q):
            names = optimizer.state[p]
            name = f"factors.{axis}.{'diag' if diagonal[axis] else 'mat'}"
            expected = np.diag(Q) if diagonal[axis] else Q
            np.testing.assert_allclose(names[name].numpy(), expected, rtol=1e-8, atol=1e-10)
            assert names[f"bounds.{axis}"].item() == pytest.approx(oracles[i].L[axis], rel=1e-8)


def test_large_gradients_have_larger_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of 1 / eps without damping adds |G|: the factors of positive gradients see 2 G."""
    G = torch.rand(4, 4, dtype=torch.float64) + 0.1

    def factors(noise: float, gradient: Tensor) -> Tensor:
        monkeypatch.setattr(
            StepContext, "randn", lambda ctx, *dims: gradient.new_full((1, *dims), noise)
        )
        p = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        optimizer = PSGDKron([p], damping=0.0, init_scale=1.0)
        p.grad = gradient.clone()
        optimizer.step()
        return optimizer.state[p]["factors.0.mat"].clone()

    doubled = factors(0.0, 2 * G)
    torch.testing.assert_close(factors(1 / torch.finfo(G.dtype).eps, G), doubled)
    assert not torch.allclose(factors(0.0, G), doubled)


def test_factors_whiten_gradients() -> None:
    """After many updates, the preconditioned gradients have a covariance of 1."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    left = torch.randn(4, 4, dtype=torch.float64)
    optimizer = PSGDKron([p], lr=0.0, momentum=0.0)
    entries = []
    for step in range(2000):
        G = left @ torch.randn(4, 6, dtype=torch.float64) * 1e-3
        p.grad = G
        optimizer.step()
        if step >= 1500:
            state = optimizer.state[p]
            Q, q = state["factors.0.mat"], state["factors.1.diag"]
            entries.append(Q.mT @ Q @ G * q**2)
    covariance = torch.stack([E @ E.mT for E in entries]).mean(0) / 6
    assert (covariance - torch.eye(4, dtype=torch.float64)).abs().max() < 0.3


def test_rows_with_their_own_updates_have_their_own_momentum(noise: list[Tensor]) -> None:
    params = [nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(2)]
    optimizer = PSGDKron(params, lr=LR, momentum=0.99, precondition_frequency=10**6)
    for step in range(3):
        for p in params:
            p.grad = torch.randn(3, 3, dtype=torch.float64)
        if step == 0:
            params[1].grad = None
        optimizer.step()
        if step == 1:
            # the first gradient of a row is its whole momentum
            assert params[1].grad is not None
            torch.testing.assert_close(optimizer.state[params[1]]["exp_avg"], params[1].grad)


def test_staggered_runs_resume_with_the_same_bits() -> None:
    """The noise depends on a row and its update, not on the run, nor on which rows are due."""

    def run(seed: int, steps: range, resumed: dict[str, Any] | None = None) -> dict[str, Any]:
        torch.manual_seed(seed)
        optimizer = PSGDKron(params, damping=1.0, precondition_frequency=3, refresh="staggered")
        if resumed is not None:
            optimizer.load_state_dict(resumed)
        for step in steps:
            set_grads(params, step)
            optimizer.step()
        return optimizer.state_dict()

    params = [nn.Parameter(torch.zeros(3, 3)) for _ in range(4)]
    expected = run(0, range(10))["state"]
    moved = [p.detach().clone() for p in params]
    for p in params:
        p.detach().zero_()
    half = run(0, range(5))
    assert same_bits(run(1, range(5, 10), half)["state"], expected)
    assert same_bits([p.detach() for p in params], moved)


@pytest.mark.parametrize(
    ("option", "value"),
    [("init_scale", 0.0), ("init_scale", -1.0), ("max_skew", 0.0), ("damping", -1e-9)],
)
def test_bad_options_are_refused(option: str, value: float) -> None:
    with pytest.raises(HyperparameterError, match=option):
        PSGDKronStrategy(**{option: value})


def test_long_axes_are_diagonal() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8, bias=False))
    rows = {row.names[0]: row.structures for row in describe(PSGDKron(model)).rows}
    assert rows == {
        "0.weight": ("diagonal", "dense"),
        "0.bias": ("diagonal",),
        "1.weight": ("dense", "dense"),
    }
    rows = {row.names[0]: row.structures for row in describe(PSGDKron(model, max_skew=2.0)).rows}
    assert rows["0.weight"] == ("dense", "dense")
    with pytest.raises(StructureError, match="block2diagonal"):
        PSGDKron(model, structures="block2diagonal")


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e8])
def test_the_first_gradient_sets_the_scale(scale: float) -> None:
    p = nn.Parameter(torch.zeros(4, 5))
    optimizer = PSGDKron([p], lr=0.1, damping=0.0, preconditioner_lr=0.0)
    p.grad = torch.randn(4, 5)
    expected = p.grad / p.grad.double().pow(4).mean().sqrt().sqrt().float()
    p.grad.mul_(scale)
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.1 * expected)


def test_the_bound_is_a_lower_bound_of_the_spectral_norm() -> None:
    for n in (1, 2, 7, 30):
        A = torch.randn(5, n, n, dtype=torch.float64)
        for matrix in (A @ A.mT, A + A.mT, A - A.mT):
            found, exact = spectral_norm_bound(matrix), torch.linalg.matrix_norm(matrix, 2)
            assert (found <= exact * (1 + 1e-12)).all()
            assert (found >= 0.6 * exact).all()
    assert spectral_norm_bound(torch.zeros(2, 3, 3)).tolist() == [0, 0]
    huge = torch.eye(3) * 1e30
    assert spectral_norm_bound(huge).item() == pytest.approx(1e30)
