"""KL-Shampoo and KL-SOAP against recorded trajectories and dense formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structprecond
from structprecond import KLSOAP, KLShampoo, StructPrecondError
from tests import golden

PUBLISHED: dict[str, Any] = {"init_factor": 0.1, "shampoo_beta": -1, "policies": ()}


@pytest.mark.parametrize("name", golden.names("kl"))
def test_reproduces_the_published_trajectory(name: str) -> None:
    recorded = golden.load(name)
    model = recorded.model()
    kwargs = recorded.kwargs
    kwargs.pop("using_klsoap", None)
    if "using_clamping" in kwargs:
        kwargs["clamping"] = kwargs.pop("using_clamping")
    make = getattr(structprecond, recorded.meta["optimizer"])
    assert recorded.replay(model, make(model.parameters(), **{**PUBLISHED, **kwargs})) < 1e-4


STRUCTURES: list[Any] = ["dense", "diagonal", "block4diagonal", {2: ("dense", "none")}]


def _along(vector: Tensor, axis: int, order: int) -> Tensor:
    return vector.reshape([-1 if i == axis else 1 for i in range(order)])


def _turn(tensor: Tensor, matrices: list[Tensor], transpose: bool) -> Tensor:
    """Multiply every axis by a matrix, or by its transpose."""
    for axis, Q in enumerate(matrices):
        moved = torch.tensordot(Q.mT if transpose else Q, tensor, dims=([1], [axis]))
        tensor = moved.movedim(0, axis)
    return tensor


class _DenseKL:
    """KL-Shampoo (or KL-SOAP) for one tensor with dense factors.

    With a number `init` as published, with None from the first gradient and with capped directions.

    The first moment is kept in the original coordinates. Eigenbases follow numpy's conventions,
    on which the direction does not depend.
    """

    def __init__(
        self, p: Tensor, first: Tensor, soap: bool, clamping: bool, init: float | None = 0.1
    ) -> None:
        self.p, self.soap, self.clamping = p.clone(), soap, clamping
        self.beta1, self.beta2, self.lr, self.eps, self.decay = 0.9, 0.98, 0.01, 1e-8, 0.01
        self.beta_s, self.cap = (0.98, torch.inf) if init is not None else (0.95, 1.0)
        self.m = torch.zeros_like(p)
        self.v = torch.zeros_like(p)
        self.S, self.Q, self.values = [], [], []
        mean = sum(x**2 for x in first.flatten().tolist()) / first.numel()
        start = mean ** (1 / p.ndim) if init is None else init
        for axis, dim in enumerate(p.shape):
            G = first.movedim(axis, 0).flatten(1)
            S = (1 - self.beta_s) * G @ G.mT / G.shape[1]
            self.S.append(S if init is not None else S / start ** (p.ndim - 1))
            self.Q.append(torch.linalg.eigh(S)[1].flip(-1))
            self.values.append(torch.full((dim,), start, dtype=p.dtype))

    def roots(self) -> list[Tensor]:
        return [values**-0.5 for values in self.values]

    def step(self, grad: Tensor, refresh: bool) -> None:
        order, roots = grad.ndim, self.roots()
        rotated = _turn(grad, self.Q, transpose=True)
        self.m = self.beta1 * self.m + (1 - self.beta1) * grad
        self.v = self.beta2 * self.v + (1 - self.beta2) * rotated**2
        m = _turn(self.m, self.Q, transpose=True)
        if self.soap:
            inside = m / (self.v.sqrt() + self.eps)
        else:
            weight = torch.ones_like(m)
            for axis, root in enumerate(roots):
                weight = weight * _along(root, axis, order)
            inside = m * weight / (1 + self.eps * weight)
        direction = _turn(inside, self.Q, transpose=False)
        direction = direction * min(1.0, self.cap / float(direction.square().mean().sqrt()))
        self.p = self.p - self.lr * direction
        self.p = self.p - self.lr * self.decay * self.p
        new_values = []
        for axis in range(order):
            whitened = grad
            for other in range(order):
                if other != axis:
                    inverse = self.Q[other] * roots[other] ** 2 @ self.Q[other].mT
                    whitened = torch.tensordot(inverse, whitened, dims=([1], [other]))
                    whitened = whitened.movedim(0, other)
            G, W = (t.movedim(axis, 0).flatten(1) for t in (grad, whitened))
            outer = G @ W.mT / G.shape[1]
            self.S[axis] = self.beta_s * self.S[axis] + (1 - self.beta_s) * outer
            estimate = (self.Q[axis].mT @ outer @ self.Q[axis]).diagonal()
            average = self.beta_s * self.values[axis] + (1 - self.beta_s) * estimate
            floor = max(10, min(grad.shape[axis], 4000)) ** -2 if self.clamping else 0.0
            new_values.append(torch.maximum(average, torch.full_like(average, floor)))
        self.values = new_values
        if refresh:
            self.Q = [torch.linalg.qr(S @ Q)[0] for S, Q in zip(self.S, self.Q, strict=True)]


@pytest.mark.parametrize("start", [PUBLISHED, {}], ids=["published", "from the first gradient"])
@pytest.mark.parametrize("clamping", [True, False])
@pytest.mark.parametrize("make", [KLShampoo, KLSOAP])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (2, 3, 2, 3)])
def test_tensors_of_any_order_follow_the_dense_formulas(
    shape: tuple[int, ...], make: type[KLShampoo], clamping: bool, start: dict[str, Any]
) -> None:
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = make([p], lr=0.01, clamping=clamping, precondition_frequency=10**6, **start)
    p.grad = 1e-3 * torch.randn_like(p)
    init = start.get("init_factor")
    oracle = _DenseKL(p.detach(), p.grad, make is KLSOAP, clamping, init)
    optimizer.step()
    assert torch.equal(p, oracle.p)
    for step in range(6):
        # the last ones outgrow the eigenvalues, so that directions from the first gradient are long
        p.grad = (1e-3 if step < 4 else 1.0) * torch.randn_like(p)
        oracle.step(p.grad, refresh=False)
        optimizer.step()
        assert (p - oracle.p).norm() < 1e-9 * oracle.p.norm()


@pytest.mark.parametrize("structures", STRUCTURES)
def test_rows_wait_for_a_gradient_that_is_not_zero(structures: Any) -> None:
    params = [nn.Parameter(torch.randn(8, 8, dtype=torch.float64)) for _ in range(3)]
    alone = nn.Parameter(params[1].detach().clone())
    both = [
        KLShampoo(own, lr=0.01, precondition_frequency=2, structures=structures)
        for own in (params, [alone])
    ]
    before = params[1].detach().clone()
    for step in range(7):
        for p in params:
            p.grad = torch.randn_like(p)
        if step < 3:
            assert params[1].grad is not None
            params[1].grad.zero_()
            both[0].step()
            assert torch.equal(params[1], before)
            assert int(both[0].state[params[1]]["step"]) == 0
            continue
        both[0].step()
        alone.grad = params[1].grad
        both[1].step()
        # as if training began only now
        torch.testing.assert_close(params[1], alone, rtol=1e-9, atol=1e-12)
    assert not torch.equal(params[1], before)
    assert int(both[0].state[params[0]]["step"]) == 6


def test_the_first_gradient_sets_the_scale() -> None:
    """A model whose gradients are 1e-6 moves as much as one with gradients of 1."""
    moved = []
    for scale in (1e-6, 1.0):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        optimizer = KLShampoo([p], lr=0.01, clamping=False, eps=0.0)
        for _ in range(5):
            p.grad = scale * torch.randn_like(p)
            optimizer.step()
        moved.append(p.detach())
    torch.testing.assert_close(*moved, rtol=1e-8, atol=0)


@pytest.mark.parametrize("clamping", [True, False])
def test_small_eigenvalues_are_clamped_or_not(clamping: bool) -> None:
    # inverse roots start at 100; clamping later allows 11 and 12
    p = nn.Parameter(torch.randn(11, 12, dtype=torch.float64))
    optimizer = KLShampoo(
        [p],
        lr=0.01,
        clamping=clamping,
        precondition_frequency=10**6,
        **{**PUBLISHED, "init_factor": 1e-4},
    )
    p.grad = torch.randn_like(p)
    oracle = _DenseKL(p.detach(), p.grad, soap=False, clamping=clamping, init=1e-4)
    optimizer.step()
    for _ in range(3):
        p.grad = 1e-3 * torch.randn_like(p)
        oracle.step(p.grad, refresh=False)
        optimizer.step()
        assert (p - oracle.p).norm() < 1e-9 * oracle.p.norm()


@pytest.mark.parametrize("clamping", [True, False])
@pytest.mark.parametrize("make", [KLShampoo, KLSOAP])
@pytest.mark.parametrize("shape", [(12, 12), (11, 12)])
def test_clamped_eigenvalues_are_what_the_next_average_starts_from(
    shape: tuple[int, int], make: type[KLShampoo], clamping: bool
) -> None:
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = make([p], lr=0.01, clamping=clamping, precondition_frequency=10**6, **PUBLISHED)
    p.grad = 1e-4 * torch.randn_like(p)
    oracle = _DenseKL(p.detach(), p.grad, make is KLSOAP, clamping)
    optimizer.step()
    # without clamping, 3e-5 after 400 small gradients; the limits are 1 / 144 to 1 / 100
    lowest = torch.inf
    for scale in [1e-4] * 400 + [1e-2] * 30:
        p.grad = scale * torch.randn_like(p)
        oracle.step(p.grad, refresh=False)
        optimizer.step()
        assert (p - oracle.p).norm() < 1e-9 * oracle.p.norm()
        lowest = min(lowest, *(values.min().item() for values in oracle.values))
    assert lowest == pytest.approx(1 / 144) if clamping else lowest < 1e-3
    for axis, values in enumerate(oracle.values):
        found = optimizer.state[p][f"eigenvalues.{axis}"]
        assert torch.allclose(found, values, rtol=1e-9)


@pytest.mark.parametrize("start", [PUBLISHED, {}], ids=["published", "from the first gradient"])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_refreshes_follow_the_dense_formulas(shape: tuple[int, ...], start: dict[str, Any]) -> None:
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = KLShampoo([p], lr=0.01, precondition_frequency=2, **start)
    p.grad = torch.randn_like(p)
    init = start.get("init_factor")
    oracle = _DenseKL(p.detach(), p.grad, soap=False, clamping=True, init=init)
    optimizer.step()
    for t in range(1, 9):
        p.grad = torch.randn_like(p)
        oracle.step(p.grad, refresh=t % 2 == 0)
        optimizer.step()
        assert (p - oracle.p).norm() < 1e-7 * oracle.p.norm()


@pytest.mark.parametrize("make", [KLShampoo, KLSOAP])
def test_a_unit_without_a_factor_follows_adamw(make: type[KLShampoo]) -> None:
    ours, reference = (nn.Parameter(torch.arange(1.0, 7.0).double()) for _ in range(2))
    optimizer = make([ours], lr=0.02, betas=(0.9, 0.97), weight_decay=0.1, policies=())
    adamw = torch.optim.AdamW([reference], lr=0.02, betas=(0.9, 0.97), weight_decay=0.1)
    for _ in range(20):
        ours.grad = torch.randn_like(ours)
        reference.grad = ours.grad.clone()
        optimizer.step()
        adamw.step()
        assert (ours - reference).norm() < 1e-12 * reference.norm()


@pytest.mark.parametrize("make", [KLShampoo, KLSOAP])
@pytest.mark.parametrize("structures", STRUCTURES)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e10])
def test_hard_gradients_keep_everything_finite(
    make: type[KLShampoo], structures: Any, scale: float
) -> None:
    p = nn.Parameter(torch.randn(9, 7))
    optimizer = make([p], lr=1e-3, weight_decay=0.0, structures=structures)
    column = torch.randn(9, 1)
    for _ in range(200):
        before = p.detach().clone()
        p.grad = scale * column @ torch.randn(1, 7)
        optimizer.step()
        assert p.isfinite().all()
        assert all(t.isfinite().all() for t in optimizer.state[p].values())
        if make is KLSOAP:
            assert (p - before).abs().max() < 0.1
    for basis in optimizer.buckets[0].state.bases:  # type: ignore[attr-defined]
        if basis is not None:
            Q = basis[0].to_dense()
            assert (Q.mT @ Q - torch.eye(len(Q))).abs().max() < 1e-5


def test_diagonal_factors_keep_eigenvalues_and_no_matrices() -> None:
    p = nn.Parameter(torch.randn(4, 3))
    names = set(KLShampoo([p], structures="diagonal").state[p])
    assert {"eigenvalues.0", "eigenvalues.1", "exp_avg"} <= names
    assert not any(name.startswith(("factors", "bases", "exp_avg_sq")) for name in names)


def test_an_initial_factor_of_zero_raises() -> None:
    with pytest.raises(StructPrecondError, match="init_factor must be a finite number"):
        KLShampoo([nn.Parameter(torch.zeros(2, 2))], init_factor=0)
