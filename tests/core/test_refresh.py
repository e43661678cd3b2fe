"""Refreshes follow the requested interval, also after a unit missed one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    SIRFShampoo,
    SIRFShampooStrategy,
    StructuredOptimizer,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    backward,
    dense_units,
    mlp,
    same_bits,
    set_grads,
    spoil,
    train,
    two_groups,
    values,
)


def test_interval_callable_is_asked_once_per_step_about_the_global_step() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    asked: list[int] = []

    def T(step: int) -> bool:
        asked.append(step)
        return step in (0, 1, 4)

    optimizer, dense = SIRFShampoo(model, T=T, **SETTINGS), dense_units(twin)
    train(model, optimizer, 6)
    assert asked == list(range(6))
    for step in range(6):
        twin.zero_grad()
        backward(twin, step)
        for unit in dense:
            unit.step(6, refresh=step in (0, 1, 4))
    assert_close(values(model), values(twin))


def test_interval_callable_of_several_groups_is_asked_once_per_step() -> None:
    model = mlp()
    asked: list[int] = []

    def T(step: int) -> bool:
        asked.append(step)
        return True

    optimizer = SIRFShampoo(model, two_groups(model), T=T)
    train(model, optimizer, 3)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("T", [1, 2, 3])
def test_interval_counts_steps(T: int) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, T=T, **SETTINGS), dense_units(twin)
    train(model, optimizer, 7)
    for step in range(7):
        twin.zero_grad()
        backward(twin, step)
        for unit in dense:
            unit.step(6, refresh=step % T == 0)
    assert_close(values(model), values(twin))


def test_staggered_refreshes_take_turns_and_keep_the_interval() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = StructuredOptimizer(
        model,
        strategy=SIRFShampooStrategy(),
        hyperparameters={**SETTINGS, "T": 4},
        refresh="staggered",
        batch_size=6,
    )
    dense, params = dense_units(twin), list(model.parameters())
    refreshed: dict[int, list[int]] = {i: [] for i in range(len(params))}

    def factor(p: nn.Parameter) -> Tensor:
        kind = "diag" if p.ndim == 1 else "mat"
        return optimizer.state[p][f"preconditioner.0.{kind}"]

    for step in range(12):
        for m in (model, twin):
            set_grads(list(m.parameters()), step)
        before = [factor(p).clone() for p in params]
        optimizer.step()
        for i, (p, unit) in enumerate(zip(params, dense, strict=True)):
            changed = not same_bits(factor(p), before[i])
            refreshed[i] += [step] if changed else []
            unit.step(6, refresh=changed)
    assert_close(values(model), values(twin))
    for steps in refreshed.values():
        assert steps == list(range(steps[0], 12, 4))
        assert steps[0] < 4
    # 8 units have 4 phase offsets, and those of the two 4x4 weights differ
    assert {steps[0] for steps in refreshed.values()} == {0, 1, 2, 3}
    assert refreshed[2] != refreshed[4]


@pytest.mark.parametrize("how", ["missing", "frozen", "not finite"])
@pytest.mark.parametrize("kind", ["int", "callable"])
@pytest.mark.filterwarnings("ignore:The gradients of")
def test_unit_that_missed_its_refresh_is_refreshed_at_its_next_live_step(
    kind: str, how: str
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    T: Any = 3 if kind == "int" else lambda step: step % 3 == 0
    optimizer = SIRFShampoo(model, T=T, batch_size=6, **SETTINGS)
    dense, victim = dense_units(twin), model[4].weight
    # steps 3 and 4 are missed; an integer counts the unit's own steps: 0, 3, 6 are 0, 5, 8
    own = {0, 5, 8} if kind == "int" else {0, 5, 6, 9}
    for step in range(10):
        for m in (model, twin):
            set_grads(list(m.parameters()), step)
        missed = step in (3, 4)
        if missed and how == "missing":
            victim.grad = None
        elif missed and how == "not finite":
            spoil(victim, torch.nan)
        victim.requires_grad_(not (missed and how == "frozen"))
        optimizer.step()
        for unit in dense:
            mine = unit.params[0] is twin[4].weight
            if not (mine and missed):
                unit.step(6, refresh=step in own if mine else step % 3 == 0)
    assert_close(values(model), values(twin))
