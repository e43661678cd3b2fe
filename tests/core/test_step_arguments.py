"""Steps take closures, scaled and accumulated gradients, as in torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from structprecond import (
    SIRFShampoo,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    backward,
    data,
    dense_units,
    mlp,
    same_bits,
    snapshot,
    train,
    train_dense,
    values,
)


def test_closure_runs_once_with_gradients_enabled_and_its_loss_comes_back() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, reference = (SIRFShampoo(m, **SETTINGS) for m in (model, twin))
    losses: list[Tensor] = []

    def closure() -> Any:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(backward(model, 0))
        return losses[-1]

    with torch.no_grad():
        returned: Any = optimizer.step(closure)
    assert len(losses) == 1
    assert returned is losses[0]
    assert optimizer.batch_size == 6
    train(twin, reference, 1)
    assert same_bits(values(model), values(twin))


def test_closure_that_raises_leaves_everything_unchanged() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    train(model, optimizer, 1)
    before = snapshot(model, optimizer)

    def closure() -> float:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    assert same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize("bad", [None, 2])
def test_grad_scaler_trains_as_without_and_skips_overflowing_steps(bad: int | None) -> None:
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, reference = (SIRFShampoo(m, **SETTINGS) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(5):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        x, y = data(step, dtype=torch.float32)
        loss = (model(x) - y).square().sum(1).mean()
        scaler.scale(loss * torch.inf if step == bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == bad:
            after = snapshot(model, optimizer)
            assert all(same_bits(before[key], after[key]) for key in ("params", "stacks"))
            assert optimizer.global_step == step
        else:
            train(twin, reference, 1, start=step)
    assert scaler.get_scale() == (2.0**10 if bad is None else 2.0**9)
    assert optimizer.batch_size == 6
    assert_close(values(model), values(twin), 1e-6)


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, reference = (SIRFShampoo(m, **SETTINGS) for m in (model, twin))
    for step in range(4):
        optimizer.zero_grad()
        x, y = data(step)
        for part in (slice(0, 3), slice(3, 6)):
            loss = (model(x[part]) - y[part]).square().sum(1).mean() / 2
            loss.backward()
        optimizer.step()
        assert optimizer.batch_size == 6
        train(twin, reference, 1, start=step)
    assert_close(values(model), values(twin))


def test_two_optimizers_on_one_model_do_not_disturb_each_other() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    first, second = (SIRFShampoo(model, part, **SETTINGS) for part in (weights, biases))
    dense = dense_units(twin)
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        first.step()
        second.step()
        assert first.batch_size == second.batch_size == 6
    train_dense(twin, dense, 3)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_gradients_as_torch_does(set_to_none: bool) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    backward(model, 0)
    optimizer.zero_grad(set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not (p.grad is None or p.grad.any())


def test_gradients_are_not_overwritten_by_the_step() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, maximize=True, **SETTINGS)
    backward(model, 0)
    params = list(model.parameters())
    grads = [p.grad for p in params]
    contents = copy.deepcopy(grads)
    pointers = [p.data_ptr() for p in params]
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert same_bits(grads, contents)
    assert [p.data_ptr() for p in params] == pointers
