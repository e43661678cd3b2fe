"""SAM takes gradients that are missing, frozen, empty, huge, tiny or of low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from structprecond import (
    SAM,
)
from tests.helpers import (
    assert_close,
    same_bits,
)
from tests.sharpness.helpers import one


def test_missing_gradients() -> None:
    both, first, second, none = (one(1.0) for _ in range(4))
    sam = SAM([both, first, second, none], SGD, rho=0.5, adaptive=False, lr=1.0, weight_decay=0.1)
    both.grad, first.grad = torch.tensor([3.0]), torch.tensor([4.0])
    sam.first_step(zero_grad=True)
    perturbed = [p.item() for p in (both, first, second, none)]
    assert_close(torch.tensor(perturbed), torch.tensor([1.3, 1.4, 1.0, 1.0]), 1e-6)
    both.grad, second.grad = torch.tensor([2.0]), torch.tensor([4.0])
    sam.second_step()
    after = torch.tensor([p.item() for p in (both, first, second, none)])
    assert_close(after, torch.tensor([-1.1, 1.0, -3.1, 1.0]), 1e-6)


def test_no_gradient_at_all() -> None:
    p = one(1.0)
    sam = SAM([p], SGD, lr=0.1)
    sam.first_step()
    sam.second_step()
    assert p.item() == 1.0
    p.grad = torch.tensor([1.0])
    sam.first_step(zero_grad=True)
    sam.second_step()
    assert p.item() == 1.0
    assert sam.skipped == 0


def test_frozen_parameters_neither_move_nor_count() -> None:
    p, frozen = one(0.0, 0.0, grad=[3.0, 4.0]), one(1.0, grad=[100.0])
    frozen.requires_grad_(False)
    sam = SAM([p, frozen], SGD, rho=0.5, adaptive=False, lr=0.1)
    sam.first_step()
    assert frozen.item() == 1.0
    assert_close(p.detach(), torch.tensor([0.3, 0.4]), 1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_empty_parameters(adaptive: bool) -> None:
    p = one(1.0, grad=[1.0])
    empty, alone = (nn.Parameter(torch.ones(0, 3, dtype=d)) for d in (None, torch.float64))
    empty.grad, alone.grad = torch.ones_like(empty), torch.ones_like(alone)
    sam = SAM([p, empty, alone], SGD, rho=0.5, adaptive=adaptive, lr=1.0)
    sam.first_step(zero_grad=False)
    assert p.item() == 1.5
    sam.second_step()
    assert p.item() == 0.0


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_low_precision_is_computed_in_float32(dtype: torch.dtype, adaptive: bool) -> None:
    # squares overflow in float16, and so do products with the parameters
    p = nn.Parameter(torch.full((4, 25), 2.0, dtype=dtype))
    p.grad = torch.full_like(p, 4e4)
    wide = one(1.0, grad=[1.0], dtype=torch.float64)
    sam = SAM([p, wide], SGD, rho=5.0, adaptive=adaptive, lr=0.1)
    sam.first_step()
    # |g| = 10 * 4e4, |T g| = 2 * that, e = 5 / |T g| * T² g
    expected = 2 + (5 * 4 / (2 * 10) if adaptive else 5 / 10)
    assert p.dtype == dtype
    assert same_bits(p.detach(), torch.full_like(p, expected).detach())
    tiny = nn.Parameter(torch.full((4,), 0.5, dtype=dtype))
    tiny.grad = torch.full_like(tiny, 6e-5)
    sam = SAM([tiny], SGD, rho=1.0, adaptive=False, lr=0.1)
    sam.first_step()
    assert_close(tiny.detach().float(), torch.ones(4), 1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e30, torch.float32), (3e38, torch.float32), (1e38, torch.bfloat16), (1e200, torch.float64)],
)
def test_huge_gradients_are_finite(size: float, dtype: torch.dtype, adaptive: bool) -> None:
    p, q = (nn.Parameter(torch.tensor([2.0, -2.0], dtype=d)) for d in (dtype, torch.float64))
    p.grad = torch.full_like(p, size)
    q.grad = torch.full_like(q, p.grad[0].double().item())
    empty = nn.Parameter(torch.ones(0, 3, dtype=dtype))
    empty.grad = torch.ones_like(empty)
    groups: list[dict[str, Any]] = [{"params": [p, empty]}, {"params": [q], "rho": 2.0}]
    sam = SAM(groups, SGD, rho=1.0, adaptive=adaptive)
    sam.first_step()
    # |g| = 2 size; |T g| = 4 size, T² g = 4 size
    e = 1.0 if adaptive else 0.5
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert_close(p.detach().double(), torch.tensor([2 + e, -2 + e]).double(), tolerance)
    assert_close(q.detach(), torch.tensor([2 + 2 * e, -2 + 2 * e]).double(), 1e-6)
    p.grad, q.grad = torch.full_like(p, min(size, 1e30)), None
    sam.second_step()
    assert sam.skipped == 0
    assert p[0] < -1e26


def test_huge_gradients_of_tiny_parameters() -> None:
    p = one(*[1e-13] * 4, grad=[3e38] * 4)
    sam = SAM([p], SGD, rho=0.5, lr=0.1)
    sam.first_step()
    assert p.tolist() == pytest.approx([1.25e-13] * 4, rel=1e-5)


def test_norm_has_the_precision_of_the_widest_dtype() -> None:
    narrow, wide = one(1.0, grad=[3.0]), one(0.0, grad=[0.1], dtype=torch.float64)
    sam = SAM([narrow, wide], SGD, rho=1.0, adaptive=False, lr=0.1)
    sam.first_step()
    assert wide.item() == pytest.approx(0.1 / 9.01**0.5, rel=1e-11)


def test_tiny_gradients_are_not_blown_up() -> None:
    p = one(1.0, 1.0, grad=[1e-30, 1e-30])
    sam = SAM([p], SGD, rho=1.0, lr=0.1)
    sam.first_step()
    assert_close(p.detach(), torch.ones(2), 1e-6)
