"""Parameters train in their dtypes, factors in the requested ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    SIRFShampoo,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    dense_units,
    mlp,
    same_bits,
    set_grads,
    train,
    train_dense,
    values,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_get_the_rounded_update_of_float32_factors(
    dtype: torch.dtype,
) -> None:
    model = mlp(dtype)
    wide = mlp(torch.float32)
    optimizer, reference = (SIRFShampoo(m, batch_size=6, **SETTINGS) for m in (model, wide))
    for step in range(8):
        set_grads(list(model.parameters()), step)
        with torch.no_grad():
            for p, q in zip(model.parameters(), wide.parameters(), strict=True):
                assert p.grad is not None
                q.copy_(p)
                q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        assert all(p.dtype == dtype for p in model.parameters())
        assert same_bits(values(model), [p.to(dtype) for p in values(wide)])
    for entry in optimizer.state.values():
        floating = [t.dtype for t in entry.values() if t.is_floating_point()]
        assert set(floating) == {torch.float32}


def test_parameters_of_several_dtypes_train_as_one_at_a_time() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    layers = [nn.Linear(4, 4, dtype=dtype) for dtype in dtypes for _ in range(2)]
    model = nn.ModuleList(layers)
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    singles = [SIRFShampoo([p], batch_size=6, **SETTINGS) for p in twin.parameters()]
    for step in range(4):
        for m in (model, twin):
            set_grads(list(m.parameters()), step)
        for o in (optimizer, *singles):
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == q.dtype
        assert_close(p.detach(), q.detach(), {8: 1e-12, 4: 1e-6, 2: 1e-2}[p.element_size()])


def test_float64_parameters_have_float64_state() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    for entry in optimizer.state.values():
        assert {t.dtype for t in entry.values() if t.is_floating_point()} == {torch.float64}


def test_factors_are_stored_in_the_dtypes_asked_for() -> None:
    model = mlp()
    exact = copy.deepcopy(model)
    given: Any = {1: torch.float32, 2: (torch.bfloat16, None)}
    optimizer = SIRFShampoo(model, preconditioner_dtypes=given, **SETTINGS)
    train(model, optimizer, 5)
    entry = optimizer.state[model[2].weight]
    assert entry["preconditioner.0.mat"].dtype == torch.bfloat16
    assert entry["preconditioner_momenta.0.mat"].dtype == torch.bfloat16
    assert entry["preconditioner.1.mat"].dtype == torch.float64
    assert entry["momentum_buffer"].dtype == torch.float64
    assert optimizer.state[model[2].bias]["preconditioner.0.diag"].dtype == torch.float32
    train_dense(exact, dense_units(exact), 5)
    assert_close(values(model), values(exact), 2**-7)


def test_model_converted_to_another_dtype_goes_on_with_its_state() -> None:
    model = mlp(torch.float32)
    twin = copy.deepcopy(model).double()
    optimizer = SIRFShampoo(model, **SETTINGS)
    train(model, optimizer, 3)
    model.double()
    train(model, optimizer, 3, start=3)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    train_dense(twin, dense_units(twin), 6)
    assert_close(values(model), values(twin), 1e-4)
