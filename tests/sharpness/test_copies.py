"""Copies of SAM train equally and independently."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from structprecond import (
    SAM,
)
from tests.helpers import (
    by_pickle,
    loss_of,
    mlp,
    same_bits,
    values,
)
from tests.sharpness.helpers import BASES, one, train


def _copy(kind: str, *objects: Any) -> Any:
    return copy.deepcopy(objects) if kind == "deepcopy" else by_pickle(objects)


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
@pytest.mark.parametrize("base", ["SGD", "AdamW", "SIRFShampoo"])
@pytest.mark.parametrize("pending", [False, True])
def test_copies_go_on_alike_and_apart(base: str, kind: str, pending: bool) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    sam = SAM(model, cls, rho=0.4, **kwargs)
    sam.skipped = 3
    train(model, sam, 2)
    before = values(model)
    if pending:
        loss_of(model, 2).backward()
        sam.first_step()
    twin, other = _copy(kind, model, sam)
    assert other.skipped == 3
    assert other.param_groups is other.base_optimizer.param_groups
    assert {id(p) for p in twin.parameters()} == {
        id(p) for group in other.param_groups for p in group["params"]
    }
    if pending:
        other.restore()
        assert same_bits(values(twin), before)
        sam.restore()
    train(twin, other, 2, start=2)
    assert same_bits(values(model), before)
    train(model, sam, 2, start=2)
    assert same_bits(values(twin), values(model))
    scheduler = StepLR(other, 1)
    train(twin, other, 1, start=4)
    scheduler.step()
    if base != "SIRFShampoo":  # which wants parameters of its model
        other.add_param_group({"params": [one(1.0)]})
        assert other.param_groups[-1]["rho"] == 0.4


def test_repr_shows_base_and_groups() -> None:
    shown = repr(SAM([one(1.0)], SGD, rho=0.25, lr=0.125))
    assert all(text in shown for text in ("SAM", "SGD", "rho: 0.25", "adaptive: True", "lr: 0.125"))
