"""Hyperparameters come from the checkpoint, and live objects stay live."""

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
    WithBetas,
    mlp,
    sirf,
    through_a_file,
    train,
    with_betas,
)


def test_hyperparameters_come_from_the_checkpoint_as_torch_does() -> None:
    model = mlp()
    optimizer = sirf(model, T=5)
    optimizer.param_groups[0]["lr"] = 0.0123
    optimizer.param_groups[0]["initial_lr"] = 0.5
    fresh = SIRFShampoo(mlp(), lr=1.0, T=2)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert {key: fresh.param_groups[0][key] for key in (*SETTINGS, "T", "initial_lr")} == {
        **SETTINGS,
        "lr": 0.0123,
        "T": 5,
        "initial_lr": 0.5,
    }


@pytest.mark.parametrize("saved_lr", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
@pytest.mark.parametrize("live_lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_learning_rate_is_loaded_whether_it_is_a_tensor_or_not(live_lr: Any, saved_lr: Any) -> None:
    saved = sirf(mlp(), lr=copy.copy(saved_lr)).state_dict()
    live = live_lr.clone() if isinstance(live_lr, Tensor) else live_lr
    fresh = sirf(mlp(), lr=live)
    fresh.load_state_dict(through_a_file(saved))
    loaded = fresh.param_groups[0]["lr"]
    assert float(loaded) == 0.25
    assert loaded is live if isinstance(live, Tensor) else type(loaded) is float


def test_live_callable_stays_whatever_the_checkpoint_has() -> None:
    def live(step: int) -> bool:
        return step % 2 == 0

    for saved in (3, lambda step: True):
        optimizer = sirf(mlp(), T=saved)
        fresh = sirf(mlp(), T=live)
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
        assert fresh.param_groups[0]["T"] is live


def test_callable_in_the_checkpoint_leaves_a_live_number_alone() -> None:
    optimizer = sirf(mlp(), T=lambda step: True)
    model = mlp()
    fresh = sirf(model, T=2)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["T"] == 2
    train(model, fresh, 1)


def test_counted_batch_size_of_a_checkpoint_without_steps_leaves_a_given_one_alone() -> None:
    # regression: a counted 0 replaced the given number, and the next step failed
    fresh = sirf(mlp(), batch_size=32)
    fresh.load_state_dict(sirf(mlp()).state_dict())
    assert fresh.batch_size == 32


def test_pairs_of_numbers_come_from_the_checkpoint() -> None:
    optimizer = with_betas(WithBetas(), betas=(0.5, 0.6))
    fresh = with_betas(WithBetas())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["betas"] == (0.5, 0.6)


def test_live_objects_stay_live() -> None:
    optimizer = sirf(mlp())
    fresh = sirf(mlp())
    live = {key: fresh.param_groups[0][key] for key in ("strategy", "combine_params", "params")}
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert all(fresh.param_groups[0][key] is value for key, value in live.items())
    assert fresh.param_groups[0]["structures"] == "auto"
    assert fresh.buckets[0].group is fresh.param_groups[0]
