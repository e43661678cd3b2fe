"""Param groups given at the start or added later train equally, or are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from structprecond import (
    PerParameter,
    SIRFShampoo,
    SplitHeads,
    StructPrecondError,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    backward,
    dense_units,
    mlp,
    same_bits,
    snapshot,
    train,
    train_dense,
    values,
)

# --- learning rates and schedulers ---------------------------------------------------------------


@pytest.mark.parametrize("give", ["model", "generator", "named", "groups", "named groups", "alone"])
def test_every_way_of_giving_the_parameters_trains_alike(give: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    params: Any = {
        "model": None,
        "generator": model.parameters(),
        "named": model.named_parameters(),
        "groups": [{"params": model[:4].parameters()}, {"params": list(model[4:].parameters())}],
        "named groups": [{"params": model.named_parameters()}],
    }.get(give)
    if give == "alone":
        optimizer = SIRFShampoo(model.parameters(), batch_size=6, **SETTINGS)
    else:
        optimizer = SIRFShampoo(model, params, **SETTINGS)
    dense = dense_units(twin)
    train(model, optimizer, 3)
    train_dense(twin, dense, 3)
    assert_close(values(model), values(twin))


# --- param groups added later --------------------------------------------------------------------


def test_added_group_trains_like_one_given_at_the_start() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, model[:4].parameters(), **SETTINGS)
    optimizer.add_param_group({"params": model[4:].parameters(), "lr": 0.01, "alpha1": 0.5})
    assert optimizer.param_groups[1]["lam"] == SETTINGS["lam"]
    scheduler = LambdaLR(optimizer, [lambda e: 1.0, lambda e: 0.5**e])
    first, second = dense_units(twin[:4]), dense_units(twin[4:])
    for step in range(4):
        train(model, optimizer, 1, start=step)
        scheduler.step()
        twin.zero_grad()
        backward(twin, step)
        for unit in first:
            unit.step(6)
        for unit in second:
            unit.step(6, lr=0.01 * 0.5**step, alpha1=0.5)
    assert_close(values(model), values(twin))


def test_group_added_in_the_middle_starts_fresh_and_leaves_the_others_alone() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, model[:4].parameters(), **SETTINGS)
    first, second = dense_units(twin[:4]), dense_units(twin[4:])
    train(model, optimizer, 3)
    train_dense(twin, first, 3)
    optimizer.add_param_group({"params": list(model[4:].parameters())})
    train(model, optimizer, 3, start=3)
    train_dense(twin, first + second, 3, start=3)
    assert_close(values(model), values(twin))


def test_group_may_be_a_single_parameter() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, model[0].parameters(), batch_size=6)
    optimizer.add_param_group({"params": model[2].weight})
    before = values(model)
    train(model, optimizer, 1)
    moved = [not same_bits(a, b) for a, b in zip(before, values(model), strict=True)]
    assert moved == [True, True, True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ({"momentum": 0.9}, StructPrecondError, "momentum"),
        ({"betas": (0.9, 0.9)}, StructPrecondError, "betas"),
        ({"lr": -1.0}, StructPrecondError, "lr must be"),
        ({"structures": "dence"}, StructPrecondError, "dence"),
        ({"structures": {3: "dense"}}, StructPrecondError, r"4\.weight"),
        ({"combine_params": ()}, StructPrecondError, r"4\.weight"),
        ({"combine_params": (SplitHeads("4.weight", 3), PerParameter())}, StructPrecondError, "4"),
        ({"preconditioner_dtypes": torch.int64}, StructPrecondError, "int64"),
        ({"params": [nn.Parameter(torch.ones(5, 7))]}, StructPrecondError, r"\(5, 7\)"),
        ({"params": "known"}, ValueError, "more than one parameter group"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_group_that_is_refused_leaves_everything_unchanged(
    what: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, model[:4].parameters(), **SETTINGS)
    reference = SIRFShampoo(twin, twin[:4].parameters(), **SETTINGS)
    train(model, optimizer, 2)
    train(twin, reference, 2)
    before = snapshot(model, optimizer)
    if what.get("params") == "known":
        what = {"params": [model[4].bias, model[0].weight]}
    given = {"params": list(model[4:].parameters())} | what
    passed = dict(given)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(passed)
    assert same_bits(snapshot(model, optimizer), before)
    assert same_bits(passed, given)
    assert len(optimizer.state_dict()["state"]) == 4
    train(model, optimizer, 2, start=2)
    train(twin, reference, 2, start=2)
    assert same_bits(snapshot(model, optimizer)["params"], snapshot(twin, reference)["params"])
    optimizer.add_param_group({"params": list(model[4:].parameters())})


def test_group_may_have_a_name() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, [{"params": model.parameters(), "name": "all"}])
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["name"] == "all"
