"""Learning rates and other hyperparameters follow schedulers and the live param groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from structprecond import (
    SIRFShampoo,
)
from tests.helpers import (
    SETTINGS,
    DenseUnit,
    assert_close,
    backward,
    dense_units,
    mlp,
    same_bits,
    train,
    two_groups,
    values,
)


def test_param_groups_stay_as_given_and_each_follows_its_scheduler() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    groups, twin_groups = two_groups(model), two_groups(twin)
    optimizer = SIRFShampoo(model, groups, **SETTINGS)
    schedules = [lambda e: 0.5**e, lambda e: 1 / (1 + e)]
    scheduler = LambdaLR(optimizer, schedules)
    dense = [[DenseUnit([p]) for p in group["params"]] for group in twin_groups]
    for step in range(6):
        lrs = [base * schedule(step) for base, schedule in zip((0.1, 0.02), schedules, strict=True)]
        assert [group["lr"] for group in optimizer.param_groups] == lrs
        assert scheduler.get_last_lr() == lrs
        train(model, optimizer, 1, start=step)
        scheduler.step()
        twin.zero_grad()
        backward(twin, step)
        for units, lr in zip(dense, lrs, strict=True):
            for unit in units:
                unit.step(6, lr=lr)
        assert_close(values(model), values(twin))
    assert optimizer.global_step == 6
    for mine, given in zip(optimizer.param_groups, groups, strict=True):
        assert [id(p) for p in mine["params"]] == [id(p) for p in given["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_one_cycle_drives_the_learning_rate_that_is_used() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    one_cycle: dict[str, Any] = {"max_lr": 0.2, "total_steps": 8, "cycle_momentum": False}
    optimizer, sgd = SIRFShampoo(model, **SETTINGS), torch.optim.SGD(mlp().parameters(), lr=0.05)
    scheduler, reference = OneCycleLR(optimizer, **one_cycle), OneCycleLR(sgd, **one_cycle)
    dense = dense_units(twin)
    for step in range(8):
        train(model, optimizer, 1, start=step)
        twin.zero_grad()
        backward(twin, step)
        for unit in dense:
            unit.step(6, lr=sgd.param_groups[0]["lr"])
        sgd.step()
        if step < 7:
            scheduler.step()
            reference.step()
    assert_close(values(model), values(twin))


def test_warm_up_from_zero_updates_state_but_not_parameters() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, **SETTINGS)
    scheduler = LambdaLR(optimizer, lambda e: min(e / 3, 1.0))
    dense = dense_units(twin)
    before = values(model)
    for step in range(6):
        train(model, optimizer, 1, start=step)
        scheduler.step()
        twin.zero_grad()
        backward(twin, step)
        for unit in dense:
            unit.step(6, lr=0.05 * min(step / 3, 1.0))
        if step == 0:
            assert same_bits(values(model), before)
        for p, unit in zip(model.parameters(), dense, strict=True):
            entry = optimizer.state[p]
            assert_close(entry["momentum_buffer"], unit.problems[0].buf)
            # vectors have diagonal factors
            field, stored = ("diag", torch.diag) if p.ndim == 1 else ("mat", torch.clone)
            for k, K in enumerate(unit.problems[0].K):
                assert_close(entry[f"preconditioner.{k}.{field}"], stored(K))
                momentum = stored(unit.problems[0].m[k])
                assert_close(entry[f"preconditioner_momenta.{k}.{field}"], momentum)
    assert_close(values(model), values(twin))


def test_tensor_learning_rate_equals_float_and_is_scheduled_in_place() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer = SIRFShampoo(model, **SETTINGS | {"lr": lr})
    reference = SIRFShampoo(twin, **SETTINGS)
    schedulers = [LambdaLR(o, lambda e: 0.7**e) for o in (optimizer, reference)]
    for step in range(5):
        for m, o in ((model, optimizer), (twin, reference)):
            train(m, o, 1, start=step)
        for scheduler in schedulers:
            scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05 * 0.7**5)
    assert_close(values(model), values(twin), 1e-13)


def test_hyperparameters_are_read_from_the_live_group_at_every_step() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, **SETTINGS)
    dense = dense_units(twin)
    for step, (key, value) in enumerate([*SETTINGS.items(), ("lr", 0.01)]):
        optimizer.param_groups[0][key] = 0.6 * value
        train(model, optimizer, 1, start=step)
        twin.zero_grad()
        backward(twin, step)
        live = {k: optimizer.param_groups[0][k] for k in SETTINGS}
        for unit in dense:
            unit.step(6, **live)
    assert_close(values(model), values(twin))
