"""AdamW against torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import AdamW, SplitHeads
from tests.helpers import set_grads


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


def test_rows_of_an_embedding_are_updated_as_the_whole() -> None:
    torch.manual_seed(0)
    whole = nn.Embedding(33, 5, dtype=torch.float64)
    rows = copy.deepcopy(whole)
    optimizers = [
        AdamW(whole, lr=0.1),
        AdamW(rows, lr=0.1, combine_params=(SplitHeads("weight", heads=11),)),
    ]
    for seed in range(3):
        for model, optimizer in zip((whole, rows), optimizers, strict=True):
            set_grads(model.parameters(), seed)
            optimizer.step()
    assert optimizers[1].buckets[0].rows == 11
    assert torch.equal(whole.weight, rows.weight)
