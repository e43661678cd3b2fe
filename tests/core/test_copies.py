"""Copies of an optimizer, with its model or alone, train equally and independently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch.optim.lr_scheduler import LambdaLR

from structprecond import (
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
)
from tests.helpers import (
    COPIERS,
    SETTINGS,
    mlp,
    same_bits,
    set_grads,
    snapshot,
    train,
    two_groups,
    values,
)

STRUCTURES: list[Any] = ["dense", {1: "diagonal", 2: ("hierarchical1_1", "none")}]


@pytest.mark.parametrize("structures", STRUCTURES, ids=["dense", "mixed"])
@pytest.mark.parametrize("copier", COPIERS)
def test_copies_of_model_and_optimizer_go_on_alike_and_apart(
    copier: Callable[[Any], Any], structures: Any
) -> None:
    model = mlp()
    rules = (LinearWeightBias(), PerParameter())
    optimizer = SIRFShampoo(
        model, two_groups(model), structures=structures, combine_params=rules, **SETTINGS
    )
    train(model, optimizer, 4)
    model_copy, clone = copier((model, optimizer))
    assert clone.model is model_copy
    mine = {id(p) for p in model_copy.parameters()}
    assert {id(p) for group in clone.param_groups for p in group["params"]} == mine
    assert {id(p) for p in clone.state} <= mine
    before = snapshot(model, optimizer)
    for part in ("params", "shown", "stacks", "counters"):
        assert same_bits(snapshot(model_copy, clone)[part], before[part])
    train(model_copy, clone, 6, start=4)
    assert same_bits(snapshot(model, optimizer), before)
    train(model, optimizer, 6, start=4)
    assert same_bits(snapshot(model_copy, clone)["params"], snapshot(model, optimizer)["params"])
    assert same_bits(snapshot(model_copy, clone)["stacks"], snapshot(model, optimizer)["stacks"])
    # the param groups of the copy are live and separate
    clone.param_groups[0]["lr"] = clone.param_groups[1]["lr"] = 0.0
    frozen = values(model_copy)
    train(model_copy, clone, 1)
    assert same_bits(values(model_copy), frozen)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("copier", COPIERS)
def test_copy_of_the_optimizer_alone_goes_on_alike(
    copier: Callable[[Any], Any], with_model: bool
) -> None:
    model = mlp()
    first: Any = model if with_model else model.parameters()
    optimizer = SIRFShampoo(first, batch_size=6, **SETTINGS)
    train(model, optimizer, 3)
    clone = copier(optimizer)
    before = snapshot(model, optimizer)
    for step in range(5):
        set_grads(clone.param_groups[0]["params"], step)
        clone.step()
    assert same_bits(snapshot(model, optimizer), before)
    for step in range(5):
        set_grads(optimizer.param_groups[0]["params"], step)
        optimizer.step()
    mine, theirs = ([p.detach() for p in o.param_groups[0]["params"]] for o in (optimizer, clone))
    assert same_bits(mine, theirs)


@pytest.mark.parametrize("copier", COPIERS)
def test_copy_made_under_a_scheduler_steps_itself(copier: Callable[[Any], Any]) -> None:
    # schedulers replace optimizer.step by a function that is bound to the original
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    LambdaLR(optimizer, lambda e: 0.9**e)
    train(model, optimizer, 2)
    model_copy, clone = copier((model, optimizer))
    before = snapshot(model, optimizer)
    train(model_copy, clone, 3, start=2)
    assert same_bits(snapshot(model, optimizer), before)
    train(model, optimizer, 3, start=2)
    assert same_bits(values(model), values(model_copy))


@pytest.mark.parametrize("copier", COPIERS)
def test_model_that_holds_its_optimizer_can_be_copied(copier: Callable[[Any], Any]) -> None:
    # in such a cycle, the optimizer is restored before the model is complete
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    model.optimizer = optimizer
    train(model, optimizer, 2)
    model_copy = copier(model)
    clone: Any = model_copy.optimizer
    assert clone.model is model_copy
    train(model_copy, clone, 2, start=2)
    assert clone.batch_size == 6
    train(model, optimizer, 2, start=2)
    assert same_bits(values(model), values(model_copy))


def test_callables_among_the_hyperparameters_survive_a_deepcopy() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, T=lambda step: step % 3 == 0, **SETTINGS)
    train(model, optimizer, 2)
    model_copy, clone = copy.deepcopy((model, optimizer))
    train(model, optimizer, 4, start=2)
    train(model_copy, clone, 4, start=2)
    assert same_bits(values(model), values(model_copy))
