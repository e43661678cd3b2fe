"""Rounding errors stay small: runs whose gradients differ by rounding end up together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import KLSOAP, SOAP, KLShampoo, Shampoo, StructuredOptimizer

SIZES = (20, 12, 30, 5)

Make = Callable[..., StructuredOptimizer]
ROTATED: dict[str, Make] = {
    "SOAP": partial(SOAP, lr=0.01),
    "KL-SOAP": partial(KLSOAP, lr=0.01),
    "KL-Shampoo": partial(KLShampoo, lr=0.01),
    "SOAP blocks": partial(SOAP, lr=0.01, structures="block8diagonal"),
    "SOAP one-sided": partial(SOAP, lr=0.01, structures={1: "none", 2: ("dense", "none")}),
    "SOAP transport": partial(SOAP, lr=0.01, transport=True),
}


def _train(
    make: Make, dtype: torch.dtype, noise: float, activation: type[nn.Module], **settings: Any
) -> Tensor:
    """Return the parameters after 30 steps with relative noise in the gradients."""
    torch.manual_seed(0)
    pairs = pairwise(SIZES)
    layers = [layer for n, m in pairs for layer in (nn.Linear(n, m), activation())]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    optimizer = make(model, **settings)
    data, disturbance = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    for _ in range(30):
        x, y = (torch.randn(64, n, generator=data, dtype=torch.float64) for n in (20, 5))
        optimizer.zero_grad()
        (model(x.to(dtype)) - y.to(dtype)).square().mean().backward()
        for p in model.parameters():
            assert p.grad is not None
            random = torch.randn(p.shape, generator=disturbance, dtype=torch.float64)
            p.grad *= 1 + noise * random.to(dtype)
        optimizer.step()
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def _difference(make: Make, dtype: torch.dtype, noise: float, **settings: Any) -> float:
    settings.setdefault("activation", nn.Tanh)
    plain, disturbed = (_train(make, dtype, size, **settings) for size in (0.0, noise))
    return float((plain - disturbed).norm() / plain.norm())


@pytest.mark.parametrize("frequency", [10, 2, 1])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("make", ROTATED.values(), ids=ROTATED.keys())
def test_rounding_in_float64_is_not_amplified(
    make: Make, activation: type[nn.Module], frequency: int
) -> None:
    # all first gradients have null spaces; frequency 1 refreshes factors of every rank
    difference = _difference(
        make, torch.float64, 1e-15, activation=activation, precondition_frequency=frequency
    )
    assert difference < (1e-10 if frequency > 1 else 1e-9)


@pytest.mark.parametrize("name", ["SOAP", "KL-SOAP", "KL-Shampoo"])
def test_rounding_in_float32_is_not_amplified(name: str) -> None:
    assert _difference(ROTATED[name], torch.float32, 1e-7) < 1e-3


def test_rounding_in_float64_passes_through_inverse_roots() -> None:
    # without a basis, null eigenvalues are rounding errors next to a damping of 1e-12
    assert _difference(Shampoo, torch.float64, 1e-15) < 1e-5


@pytest.mark.parametrize("make", [SOAP, KLSOAP, KLShampoo])
@pytest.mark.parametrize("shape", [(6, 2, 3), (30, 4), (3, 40), (7,)])
def test_the_first_basis_is_that_of_the_factor(make: Make, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = make([p], precondition_1d=True)
    p.grad = torch.randn(shape, dtype=torch.float64)
    optimizer.step()
    for axis, n in enumerate(shape):
        X = p.grad.movedim(axis, 0).reshape(n, -1)
        values, U = torch.linalg.eigh(X @ X.mT)
        rank = min(X.shape)
        Q = optimizer.state[p][f"bases.{axis}.mat"]
        eye = torch.eye(n, dtype=torch.float64)
        assert (Q.mT @ Q - eye).abs().max() < 1e-13
        # the columns of the range are eigenvectors, those of the null space are orthogonal to it
        overlaps = (U.flip(-1).mT @ Q).abs()
        assert (overlaps[:rank, :rank] - eye[:rank, :rank]).abs().max() < 1e-8
        assert overlaps[:rank, rank:].numel() == 0 or overlaps[:rank, rank:].max() < 1e-8
        assert values[-1] > 0


def test_a_first_gradient_of_zero_gives_identities() -> None:
    p = nn.Parameter(torch.randn(5, 3))
    optimizer = SOAP([p])
    p.grad = torch.zeros(5, 3)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["bases.0.mat"], torch.eye(5))
    assert torch.equal(optimizer.state[p]["bases.1.mat"], torch.eye(3))


def test_tiny_first_gradients_have_the_bases_of_larger_ones() -> None:
    # their squares underflow
    grad = torch.randn(6, 4)
    bases = []
    for scale in (1.0, 2.0**-90):
        p = nn.Parameter(torch.zeros(6, 4))
        optimizer = SOAP([p])
        p.grad = grad * scale
        optimizer.step()
        bases.append([optimizer.state[p][f"bases.{k}.mat"] for k in (0, 1)])
    for large, small in zip(*bases, strict=True):
        assert torch.equal(large, small)
