"""Non-finite gradients skip only their unit, raise, or are ignored, as requested."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from structprecond import (
    GradientError,
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    SplitHeads,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    backward,
    dense_units,
    mlp,
    same_bits,
    snapshot,
    spoil,
    train,
    values,
)

BAD = [torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_gradients_skip_their_unit_alone(bad: float) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, **SETTINGS), dense_units(twin)
    victims = {3: [model[2].weight], 4: [model[2].weight, model[4].bias]}
    params = list(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            for m in (model, twin):
                m.zero_grad()
                backward(m, step)
            for p in victims.get(step, []):
                spoil(p, bad)
            before = snapshot(model, optimizer)
            optimizer.step()
            after = snapshot(model, optimizer)
            for i, (unit, p) in enumerate(zip(dense, params, strict=True)):
                if not any(p is victim for victim in victims.get(step, [])):
                    unit.step(6)
                    continue
                name = optimizer.name_of(params[i])
                assert same_bits(after["params"][name], before["params"][name])
                old, new = before["shown"][name], after["shown"][name]
                changed = {key for key in new if not same_bits(old[key], new[key])}
                assert changed == {"skipped", "global_step"}
    assert_close(values(model), values(twin))
    assert optimizer.skipped == 3
    assert optimizer.state[model[2].weight]["skipped"].item() == 2
    assert optimizer.state[model[4].bias]["skipped"].item() == 1
    assert [w.category for w in caught] == [UserWarning]
    assert "2.weight" in str(caught[0].message)


@pytest.mark.filterwarnings("ignore:The gradients of")
def test_nonfinite_gradient_of_one_member_skips_the_whole_unit() -> None:
    model = mlp()
    rules = (LinearWeightBias(), SplitHeads("6.weight", 2), PerParameter())
    optimizer = SIRFShampoo(model, combine_params=(rules[1], rules[0], rules[2]), **SETTINGS)
    backward(model, 0)
    spoil(model[2].bias, torch.nan)
    spoil(model[6].weight, torch.inf)
    before = values(model)
    optimizer.step()
    moved = [not same_bits(a, b) for a, b in zip(values(model), before, strict=True)]
    assert moved == [True, True, False, False, True, True, False, True]
    assert optimizer.skipped == 2


@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_raise_names_the_parameter_and_changes_nothing(bad: float) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, nonfinite="raise", **SETTINGS)
    train(model, optimizer, 2)
    backward(model, 2)
    spoil(model[4].bias, bad)
    before = snapshot(model, optimizer)
    with pytest.raises(GradientError, match=r"4\.bias.*step 2"):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)


def test_nonfinite_ignore_spoils_no_other_row_of_the_stack() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, nonfinite="ignore", **SETTINGS), dense_units(twin)
    for m in (model, twin):
        backward(m, 0)
    spoil(model[2].weight, torch.nan)
    optimizer.step()
    for unit in dense:
        unit.step(6)
    assert model[2].weight.isnan().any()
    assert optimizer.skipped == 0
    others = [i for i, p in enumerate(model.parameters()) if p is not model[2].weight]
    assert_close([values(model)[i] for i in others], [values(twin)[i] for i in others])


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.bfloat16, 1e38), (torch.float64, 1e60)]
)
def test_large_finite_gradients_are_not_taken_for_infinite(dtype: torch.dtype, size: float) -> None:
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = SIRFShampoo([p], batch_size=1, lr=1e-3 / size, T=lambda step: False)
    p.grad = torch.full_like(p, size)
    optimizer.step()
    assert optimizer.skipped == 0
    assert_close(p.detach().double(), torch.full((4,), -1e-3).double(), 1e-2)
