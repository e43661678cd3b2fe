"""Shampoo against recorded trajectories and dense formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import Shampoo, StructPrecondError
from tests import golden


@pytest.mark.parametrize("name", golden.names("shampoo_"))
def test_reproduces_the_published_trajectory(name: str) -> None:
    recorded = golden.load(name)
    model = recorded.model()
    kwargs = recorded.kwargs
    kwargs["eps"] = kwargs.pop("epsilon")
    kwargs["betas"] = tuple(kwargs["betas"])
    kwargs["grafting"] = "adam" if recorded.meta["grafting"].startswith("adam") else None
    optimizer = Shampoo(model.parameters(), **kwargs)
    assert recorded.replay(model, optimizer) < 1e-6


STRUCTURES: list[Any] = ["dense", "diagonal", "block4diagonal", {2: ("dense", "none")}]


def _inverse_root(A: Tensor, exponent: float, eps: float) -> Tensor:
    values, Q = torch.linalg.eigh(A)
    return Q * (values - values.min().clamp(max=0) + eps) ** -exponent @ Q.mT


def _dense_direction(grads: list[Tensor], t: int, **kw: Any) -> Tensor:
    """Return Shampoo's direction at update t, refreshed at every step, as published."""
    order = grads[0].ndim
    beta1, beta2 = kw["betas"]
    m = torch.zeros_like(grads[0])
    v = torch.zeros_like(m)
    factors = [torch.zeros(d, d, dtype=m.dtype) for d in m.shape]
    for G in grads[:t]:
        m = beta1 * m + (1 - beta1) * G
        v = beta2 * v + (1 - beta2) * G**2
        for axis in range(order):
            X = G.movedim(axis, 0).reshape(G.shape[axis], -1)
            factors[axis] = beta2 * factors[axis] + (1 - beta2) * X @ X.mT
    m = m / (1 - beta1**t)
    direction = m
    for axis, S in enumerate(factors):
        P = _inverse_root(S / (1 - beta2**t), kw.get("exponent") or 1 / (2 * order), kw["eps"])
        direction = torch.tensordot(P, direction, dims=([1], [axis])).movedim(0, axis)
    grafted = {
        None: None,
        "sgd": m,
        "rmsprop": m / (v.sqrt() + 1e-8),
        "adam": m / ((v / (1 - beta2**t)).sqrt() + 1e-8),
    }[kw["grafting"]]
    if grafted is None:
        return direction
    if t < kw.get("start", 1):
        return grafted
    return direction * grafted.norm() / (direction.norm() + 1e-16)


@pytest.mark.parametrize("grafting", [None, "sgd", "rmsprop", "adam"])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 2), (6,)])
@pytest.mark.parametrize("exponent", [None, 0.4])
def test_directions_follow_the_dense_formulas(
    shape: tuple[int, ...], grafting: Any, exponent: float | None
) -> None:
    settings: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-6, "exponent": exponent}
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Shampoo([p], lr=1.0, grafting=grafting, precondition_frequency=1, **settings)
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(5)]
    for t, grad in enumerate(grads, start=1):
        before, p.grad = p.detach().clone(), grad.clone()
        optimizer.step()
        expected = _dense_direction(grads, t, grafting=grafting, **settings)
        assert (before - p.detach() - expected).norm() < 1e-8 * expected.norm()


def test_before_the_start_step_the_grafted_direction_is_taken() -> None:
    settings: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-6, "grafting": "adam"}
    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = Shampoo(
        [p], lr=1.0, start_preconditioning_step=3, precondition_frequency=1, **settings
    )
    grads = [torch.randn(4, 3, dtype=torch.float64) for _ in range(4)]
    for t, grad in enumerate(grads, start=1):
        before, p.grad = p.detach().clone(), grad.clone()
        optimizer.step()
        expected = _dense_direction(grads, t, start=3, **settings)
        assert (before - p.detach() - expected).norm() < 1e-8 * expected.norm()


def test_weight_decay_is_added_to_the_direction() -> None:
    p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    q.grad = p.grad.clone()
    Shampoo([p], lr=0.1, weight_decay=0.5).step()
    Shampoo([q], lr=0.1).step()
    assert (p.detach() - (q.detach() - 0.1 * 0.5 * before)).norm() < 1e-14


def test_iterations_agree_with_the_eigendecomposition() -> None:
    grads = [torch.randn(6, 5, dtype=torch.float64) for _ in range(5)]
    results = []
    for root in ("eigh", "coupled_newton", "newton_db"):
        p = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        optimizer = Shampoo([p], lr=1.0, eps=1e-2, root=root, precondition_frequency=1)
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        results.append(p.detach())
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-3 * results[0].norm()


def test_diagonal_factors_take_roots_entry_by_entry() -> None:
    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    p.grad = G = torch.randn(4, 3, dtype=torch.float64)
    Shampoo([p], lr=1.0, betas=(0.0, 0.9), eps=1e-9, grafting=None, structures="diagonal").step()
    rows, columns = G.square().sum(1, keepdim=True), G.square().sum(0, keepdim=True)
    expected = -G * (rows + 1e-9) ** -0.25 * (columns + 1e-9) ** -0.25
    assert (p.detach() - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("structures", STRUCTURES)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e10])
def test_hard_gradients_give_finite_bounded_updates(structures: Any, scale: float) -> None:
    p = nn.Parameter(torch.randn(9, 7))
    optimizer = Shampoo([p], lr=1e-3, eps=1e-8, structures=structures)
    column = torch.randn(9, 1)
    for _ in range(200):
        before = p.detach().clone()
        p.grad = scale * column @ torch.randn(1, 7)
        optimizer.step()
        assert p.isfinite().all()
        # as long as Adam's, each entry of which is at most about 10 at betas (0.9, 0.99)
        assert (p - before).norm() <= 1e-3 * 11 * p.numel() ** 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grafting": "lamb"}, "grafting must be 'adam', 'rmsprop', 'sgd' or None, got 'lamb'"),
        ({"root": "cholesky"}, "root must be 'eigh', 'coupled_newton' or 'newton_db'"),
        ({"exponent": 0.0}, "exponent must be a finite number above 0, got 0.0"),
        ({"start_preconditioning_step": 0}, "start_preconditioning_step must be an integer"),
    ],
)
def test_wrong_configuration_raises(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(StructPrecondError, match=message):
        Shampoo([nn.Parameter(torch.zeros(2, 2))], **wrong)


def test_rows_before_and_after_their_start_share_a_stack() -> None:
    params = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(3)]
    late = Shampoo(params, lr=1.0, start_preconditioning_step=3, grafting="sgd")
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    each = [Shampoo([p], lr=1.0, start_preconditioning_step=3, grafting="sgd") for p in alone]
    for step in range(6):
        for row, (p, q) in enumerate(zip(params, alone, strict=True)):
            if step >= row:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
                each[row].step()
        late.step()
        for p, q in zip(params, alone, strict=True):
            assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)
