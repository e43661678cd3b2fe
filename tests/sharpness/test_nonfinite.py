"""SAM skips a step whose gradients are not finite, or lets a structured base decide."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch.optim import SGD

from structprecond import (
    SAM,
    SOAP,
    GradientError,
    SIRFShampoo,
)
from tests.helpers import (
    loss_of,
    mlp,
    same_bits,
    snapshot,
    values,
)
from tests.sharpness.helpers import BASES, bits, one, train


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_step_with_a_nonfinite_gradient_is_skipped_whole(
    base: str, manual: bool, which: int, bad: float
) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, cls, rho=0.4, **kwargs) for m in (model, twin))
    train(model, sam, 2)
    before = bits(model, sam)

    def step(number: int) -> Any:
        calls = 0

        def closure() -> Any:
            nonlocal calls
            calls += 1
            loss = loss_of(model, number)
            loss.backward()
            if calls == which:
                model[2].weight.grad[0, 0] = bad
            return loss

        if not manual:
            loss = sam.step(closure)
            assert calls == which
            return loss
        sam.zero_grad()
        loss = closure()
        sam.first_step(zero_grad=True)
        closure()
        sam.second_step()
        return loss

    name = "first" if which == 1 else "second"
    with pytest.warns(UserWarning, match=f"gradient of the {name} pass was not finite") as caught:
        loss = step(7)
    assert len(caught) == 1
    assert manual or caught[0].filename == __file__
    assert math.isfinite(loss.item())
    assert sam.skipped == 1
    assert same_bits(bits(model, sam), before)
    step(8)  # without a second warning, which would be an error
    assert sam.skipped == 2
    assert same_bits(bits(model, sam), before)
    train(model, sam, 2, start=2)
    train(twin, reference, 4)
    assert same_bits(values(model), values(twin))


def test_nonfinite_parameter_skips_the_step() -> None:
    p = one(torch.inf, 1.0, grad=[0.0, 1.0])
    sam = SAM([p], SGD, lr=0.1)
    sam.first_step()
    with pytest.warns(UserWarning, match="first pass"):
        sam.second_step()
    assert p.tolist() == [torch.inf, 1.0]


def test_first_pass_that_failed_is_known_by_its_gradients() -> None:
    """Other ranks learn of a failed pass when gradients are averaged: none may be finite."""
    p, q = one(1.0, grad=[torch.inf]), one(2.0, grad=[1.0])
    sam = SAM([p, q], SGD, lr=0.1)
    sam.first_step(zero_grad=True)
    assert p.grad is not None
    assert q.grad is not None
    assert p.grad.isnan().all()
    assert q.grad.isnan().all()
    assert (p.item(), q.item(), sam.skipped) == (1.0, 2.0, 1)
    p.grad, q.grad = torch.ones(1), torch.ones(1)  # cleared by other code
    with pytest.warns(UserWarning, match="first pass"):
        sam.second_step()
    assert (p.item(), q.item(), sam.skipped) == (1.0, 2.0, 1)


def test_structured_base_decides_about_the_second_pass() -> None:
    model = mlp()
    sam = SAM(model, SOAP, rho=0.4)
    train(model, sam, 2)
    before = snapshot(model, sam.base_optimizer)  # type: ignore[arg-type]
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss = loss_of(model, 7)
        loss.backward()
        if calls == 2:
            model[2].weight.grad[0, 0] = torch.nan
        return loss

    with pytest.warns(UserWarning, match=re.escape("gradients of 2.weight are not finite")):
        sam.step(closure)
    after = snapshot(model, sam.base_optimizer)  # type: ignore[arg-type]
    stayed = [n for n, p in after["params"].items() if same_bits(p, before["params"][n])]
    assert stayed == ["2.weight"]
    assert (sam.skipped, sam.base_optimizer.skipped) == (0, 1)  # type: ignore[attr-defined]


def test_structured_base_that_raises_changes_nothing() -> None:
    model = mlp()
    sam = SAM(model, SIRFShampoo, rho=0.4, nonfinite="raise", batch_size=6)
    train(model, sam, 2)
    before = snapshot(model, sam.base_optimizer)  # type: ignore[arg-type]
    loss_of(model, 7).backward()
    sam.first_step(zero_grad=True)
    (loss_of(model, 7) * torch.inf).backward()
    with pytest.raises(GradientError, match="are not finite at step 2"):
        sam.second_step()
    assert same_bits(snapshot(model, sam.base_optimizer), before)  # type: ignore[arg-type]
    assert sam.skipped == 0
