"""A param group may have its own strategy, and a strategy decides when it decays."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from structprecond import (
    LinearWeightBias,
    SIRFShampooStrategy,
    StructuredOptimizer,
)
from tests.helpers import (
    SETTINGS,
    DenseUnit,
    PlainDescent,
    assert_close,
    backward,
    linear_unit,
    mlp,
    train,
    values,
)


@dataclass(frozen=True)
class LateDecay(PlainDescent):
    """Decays after the update."""

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        before, after = super().decay_factors(hp)
        return after, before


@pytest.mark.parametrize("strategy", [PlainDescent(), LateDecay()], ids=["before", "after"])
def test_decoupled_weight_decay_comes_before_or_after_the_update(strategy: PlainDescent) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    settings = {"lr": 0.1, "weight_decay": 0.3}
    optimizer = StructuredOptimizer(model, strategy=strategy, hyperparameters=settings)
    train(model, optimizer, 3)
    for step in range(3):
        twin.zero_grad()
        backward(twin, step)
        with torch.no_grad():
            for p in twin.parameters():
                assert p.grad is not None
                if type(strategy) is PlainDescent:
                    p.copy_(p - 0.03 * p - 0.1 * p.grad)
                else:
                    p.copy_((p - 0.1 * p.grad) * 0.97)
    assert_close(values(model), values(twin))


def test_group_may_bring_a_strategy_structures_and_rules_of_its_own() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    groups = [
        {"params": model[0].parameters(), "strategy": PlainDescent()},
        {"params": model[2].parameters(), "structures": "diagonal"},
        {"params": model[4:].parameters(), "combine_params": (LinearWeightBias(),)},
    ]
    optimizer = StructuredOptimizer(
        model,
        groups,
        strategy=SIRFShampooStrategy(),
        hyperparameters=SETTINGS,
        batch_size=6,
    )
    assert set(PlainDescent.hyperparameters) <= set(optimizer.param_groups[0])
    assert "alpha1" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]
    diagonal = [DenseUnit([p], structures=["diagonal"] * p.ndim) for p in twin[2].parameters()]
    pairs = [linear_unit(twin[i]) for i in (4, 6)]
    train(model, optimizer, 4)
    for step in range(4):
        twin.zero_grad()
        backward(twin, step)
        with torch.no_grad():
            for p in twin[0].parameters():
                assert p.grad is not None
                p -= 0.05 * p.grad
        for unit in diagonal + pairs:
            unit.step(6)
    assert_close(values(model), values(twin))
