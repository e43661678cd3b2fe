"""The recommended settings fit their optimizers, and train from the first step on."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import structprecond
from structprecond import RECOMMENDED, Muon, describe
from tests.core.routed import net, train
from tests.every_strategy import OPTIMIZERS

every_entry = pytest.mark.parametrize("name", RECOMMENDED)


def test_every_optimizer_has_an_entry() -> None:
    assert set(RECOMMENDED) == {optimizer.__name__ for optimizer in OPTIMIZERS}
    assert all(type(settings) is dict for settings in RECOMMENDED.values())


@every_entry
def test_keys_are_keywords_that_change_something(name: str) -> None:
    keywords = inspect.signature(getattr(structprecond, name)).parameters
    for key, value in RECOMMENDED[name].items():
        assert key in keywords
        assert keywords[key].default != value


@every_entry
def test_settings_make_the_optimizer_and_train(name: str) -> None:
    model = net()
    optimizer = getattr(structprecond, name)(model, **RECOMMENDED[name])
    assert describe(optimizer).rows
    # as they were measured: with a warm-up and a decay
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / 100))
    losses = []
    for step in range(100):
        losses += train(model, optimizer, range(step, step + 1))
        schedule.step()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert optimizer.skipped == optimizer.failed == 0


@every_entry
def test_settings_suit_convolutions_and_odd_shapes(name: str) -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(2, 3), nn.LayerNorm(3))
    optimizer = getattr(structprecond, name)(model, **RECOMMENDED[name])
    model(torch.ones(4, 1, 2, 2, 2)).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_entries_are_not_shared() -> None:
    """Changing one leaves the others alone."""
    ids = [id(settings) for settings in RECOMMENDED.values()]
    assert len(set(ids)) == len(ids)
    optimizer = Muon(net(), **RECOMMENDED["Muon"] | {"lr": 0.5})
    assert optimizer.param_groups[0]["lr"] == 0.5
