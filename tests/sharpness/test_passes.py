"""SAM makes two passes, by a closure or by hand, and counts the samples of one."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from structprecond import (
    SAM,
    SIRFShampoo,
    StructPrecondError,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    loss_of,
    mlp,
    same_bits,
    values,
)
from tests.sharpness.helpers import one, train, train_by_hand

# --- passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("who_clears", ["nobody", "sam", "model"])
def test_closure_is_called_twice_with_cleared_gradients(who_clears: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sam = SAM(model, SGD, rho=0.4, lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    expected = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), [(names, 0.4, True)], 1)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    calls = []

    def closure() -> Any:
        if who_clears == "sam":
            sam.zero_grad()
        elif who_clears == "model":
            model.zero_grad(set_to_none=False)
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        loss: Any = sam.step(closure)
    assert len(calls) == 2
    assert calls[0] < calls[1]  # the second pass is at the perturbed point, where the loss is high
    assert loss.item() == calls[0]
    assert_close(torch.tensor(calls[0]), torch.tensor(expected[0]))
    assert_close(values(model), values(twin))
    sam.step(closure=closure)
    assert len(calls) == 4


def test_parameters_return_to_their_bits() -> None:
    model = mlp(torch.float32)
    sam = SAM(model, SGD, rho=1e4, lr=0.0)
    before = values(model)
    loss_of(model, 0).backward()
    sam.first_step(zero_grad=True)
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(values(model), before, strict=True))
    loss_of(model, 0).backward()
    sam.second_step(zero_grad=True)
    assert same_bits(values(model), before)
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, 0).backward()
    sam.first_step()
    sam.restore()
    assert same_bits(values(model), before)


@pytest.mark.parametrize("finish", ["step", "second_step"])
def test_by_hand_equals_the_closure(finish: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, AdamW, rho=0.4, lr=0.1) for m in (model, twin))
    for step in range(3):
        sam.zero_grad()
        loss_of(model, step).backward()
        sam.first_step(zero_grad=True)
        loss_of(model, step).backward()
        assert getattr(sam, finish)() is None
        assert next(model.parameters()).grad is not None
    train(twin, reference, 3)
    assert same_bits(values(model), values(twin))


def test_first_step_twice_gives_up_the_second_pass() -> None:
    p = one(1.0, -2.0, grad=[3.0, 4.0])
    sam = SAM([p], SGD, rho=0.5, lr=1.0)
    sam.first_step()
    once = p.detach().clone()
    sam.first_step()
    assert same_bits(p.detach(), once)
    p.grad = torch.tensor([1.0, 1.0])
    sam.second_step()
    assert p.tolist() == [0.0, -3.0]


def test_closure_gives_up_a_pending_first_step() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, SGD, rho=0.4, lr=0.1) for m in (model, twin))
    loss_of(model, 5).backward()
    sam.first_step()
    train(model, sam, 1)
    train(twin, reference, 1)
    assert same_bits(values(model), values(twin))


def test_restore_without_a_first_step_does_nothing() -> None:
    p = one(1.0, grad=[1.0])
    sam = SAM([p], SGD, lr=0.5)
    sam.restore()
    sam.first_step()
    sam.second_step()
    sam.restore()
    assert p.tolist() == [0.5]


@pytest.mark.parametrize("finish", ["step", "second_step"])
@pytest.mark.parametrize("after", ["nothing", "a step", "a restored first step"])
def test_completing_without_a_first_step_raises(finish: str, after: str) -> None:
    model = mlp()
    sam = SAM(model, SGD, lr=0.1)
    if after == "a step":
        train(model, sam, 1)
    elif after == "a restored first step":
        loss_of(model, 0).backward()
        sam.first_step()
        sam.restore()
    before = values(model)
    with pytest.raises(StructPrecondError, match=re.escape("Call first_step() before step()")):
        getattr(sam, finish)()
    assert same_bits(values(model), before)


def test_backups_are_freed() -> None:
    """They hold as much memory as the model."""
    model = mlp()
    sam = SAM(model, SGD, lr=0.1)
    train(model, sam, 1)
    assert sam._old is None
    assert not sam.state


# --- the batch size ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closure", "by hand", "cleared by the model", "set to zero"])
def test_batch_size_is_that_of_one_pass(how: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sam = SAM(model, SIRFShampoo, rho=0.4, **SETTINGS)
    base: Any = sam.base_optimizer
    for step in range(3):
        if how == "closure":
            train(model, sam, 1, start=step)
        else:
            sam.zero_grad()
            loss_of(model, step).backward()
            sam.first_step(zero_grad=how == "by hand")
            if how == "cleared by the model":
                model.zero_grad()
            elif how == "set to zero":
                sam.zero_grad(set_to_none=False)
            loss_of(model, step).backward()
            sam.second_step()
        assert base.batch_size == 6
    reference = SIRFShampoo(twin, **SETTINGS, batch_size=6)
    names = [name for name, _ in twin.named_parameters()]
    train_by_hand(twin, reference, [(names, 0.4, True)], 3)
    assert_close(values(model), values(twin), 1e-9)
