"""Units with missing, late or frozen gradients wait, without effect on other units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from structprecond import (
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
)
from tests.helpers import (
    SETTINGS,
    DenseUnit,
    assert_close,
    backward,
    dense_units,
    linear_unit,
    mlp,
    same_bits,
    set_grads,
    snapshot,
    train,
    train_dense,
    values,
)


def test_step_without_any_gradient_changes_nothing_as_in_torch() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    before = snapshot(model, optimizer)
    optimizer.step()
    after = snapshot(model, optimizer)
    assert all(same_bits(before[key], after[key]) for key in ("params", "stacks"))
    train(model, optimizer, 1)


@pytest.mark.parametrize("missing", [0, 2, 5])
def test_unit_without_gradient_stays_as_it_is_and_the_others_do_not_notice(missing: int) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, **SETTINGS)
    dense = dense_units(twin)
    params = list(model.parameters())
    for step in range(5):
        for m in (model, twin):
            m.zero_grad()
            backward(m, step)
        skip = step in (1, 3)
        before = {name: t.clone() for name, t in optimizer.state[params[missing]].items()}
        value = params[missing].detach().clone()
        if skip:
            params[missing].grad = None
        optimizer.step()
        for i, unit in enumerate(dense):
            if not (skip and i == missing):
                unit.step(6)
        if skip:
            after = dict(optimizer.state[params[missing]])
            for name in before.keys() - {"global_step", "batch_size"}:
                assert same_bits(after[name], before[name]), name
            assert same_bits(params[missing].detach(), value)
        assert_close(values(model), values(twin))


@pytest.mark.parametrize("lacking", ["weight", "bias"])
def test_joint_unit_waits_until_all_its_members_have_gradients(lacking: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    rules = (LinearWeightBias(),)
    optimizer = SIRFShampoo(model, combine_params=rules, batch_size=6, **SETTINGS)
    dense = [linear_unit(layer) for layer in twin if isinstance(layer, nn.Linear)]
    for step in range(4):
        for m in (model, twin):
            set_grads(list(m.parameters()), step)
        if step == 1:
            getattr(model[2], lacking).grad = None
        optimizer.step()
        for unit in dense:
            if not (step == 1 and unit.params[0] is twin[2].weight):
                unit.step(6)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_member_that_is_frozen_from_the_start_leaves_the_others_to_the_next_rule(
    frozen: str,
) -> None:
    model = mlp()
    getattr(model[2], frozen).requires_grad_(False)
    twin = copy.deepcopy(model)
    rules = (LinearWeightBias(), PerParameter())
    optimizer = SIRFShampoo(model, combine_params=rules, **SETTINGS)
    dense = [linear_unit(twin[i]) for i in (0, 4, 6)]
    dense += [DenseUnit([p]) for p in twin[2].parameters() if p.requires_grad]
    train(model, optimizer, 4)
    train_dense(twin, dense, 4)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize(
    ("T", "refreshes"),
    [
        (1, set(range(12))),
        (3, {5, 8, 11}),
        # missed the refreshes at 0, 2 and 4
        (lambda step: step in (0, 2, 4, 8), {5, 8}),
    ],
    ids=["every step", "every third step of its own", "callable"],
)
def test_unit_that_gets_gradients_late_behaves_as_a_fresh_optimizer_would(
    T: Any, refreshes: set[int]
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, T=T, **SETTINGS)
    late, dense = model[4].weight, DenseUnit([twin[4].weight])
    fresh = SIRFShampoo(twin, [twin[2].weight], T=T, **SETTINGS)  # the same shape, never late
    for step in range(12):
        model.zero_grad()
        set_grads(list(model.parameters()), step)
        optimizer.batch_size = fresh.batch_size = 6
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        if step < 5:
            late.grad = None
        optimizer.step()
        fresh.step()
        if step >= 5:
            dense.step(6, refresh=step in refreshes)
        assert_close(late.detach(), twin[4].weight.detach())
        assert_close(model[2].weight.detach(), twin[2].weight.detach())
    assert optimizer.state[late]["step"].item() == 7


def test_frozen_parameters_wait_with_fresh_state_until_they_are_thawed() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    frozen = list(model[2].parameters())
    model[2].requires_grad_(False)
    optimizer = SIRFShampoo(model, **SETTINGS)
    dense, before = dense_units(twin), [p.detach().clone() for p in frozen]
    late, others = dense[2:4], dense[:2] + dense[4:]
    train(model, optimizer, 3)
    train_dense(twin, others, 3)
    assert same_bits([p.detach() for p in frozen], before)
    model[2].requires_grad_(True)
    train(model, optimizer, 3, start=3)
    train_dense(twin, others + late, 3, start=3)
    # frozen again, with the last gradient still in place
    optimizer.zero_grad()
    for m in (model, twin):
        m.zero_grad()
        backward(m, 6)
    model[2].requires_grad_(False)
    optimizer.step()
    for unit in others:
        unit.step(6)
    assert_close(values(model), values(twin))
