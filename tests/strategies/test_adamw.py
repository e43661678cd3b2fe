"""AdamW against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from structprecond import AdamW


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lr": 0.03, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
        {"maximize": True},
        {"betas": (0.0, 0.0), "eps": 1e-2, "weight_decay": 0.0},
    ],
    ids=["defaults", "others", "maximize", "no memory"],
)
def test_fifty_steps_of_torch_adamw(kwargs: Any, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(7, 5), nn.Linear(5, 5), nn.LayerNorm(5))
    model = model.to(dtype)
    other = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(7, 5), nn.Linear(5, 5), nn.LayerNorm(5))
    other = other.to(dtype)
    other.load_state_dict(model.state_dict())
    optimizer, reference = AdamW(model, **kwargs), torch.optim.AdamW(other.parameters(), **kwargs)
    for step in range(50):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            # gradients that come late and stay away
            p.grad = None if step % 7 == 3 and p.ndim == 1 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert (p - q).norm() <= tolerance * q.norm()
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] *= 0.98


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 3, 4)])
def test_rows_of_one_stack_at_different_updates(shape: tuple[int, ...]) -> None:
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(3)]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, reference = AdamW(params, lr=0.03), torch.optim.AdamW(others, lr=0.03)
    for step in range(8):
        for row, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = torch.randn_like(p) if step >= 2 * row else None
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(params, others, strict=True):
            assert (p - q).norm() <= 1e-12 * q.norm()
