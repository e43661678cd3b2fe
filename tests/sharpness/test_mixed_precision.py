"""SAM works with a gradient scaler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from structprecond import (
    SAM,
    GradientError,
)
from tests.helpers import (
    assert_close,
    loss_of,
    mlp,
    same_bits,
    values,
)
from tests.sharpness.helpers import BASES, bits, fail, one


def scaled_step(
    model: nn.Module,
    sam: SAM,
    scaler: Any,
    step: int,
    factors: tuple[float, float] = (1.0, 1.0),
    clip: float | None = None,
) -> None:
    sam.zero_grad()
    scaler.scale(loss_of(model, step) * factors[0]).backward()
    sam.first_step(zero_grad=True)
    scaler.scale(loss_of(model, step) * factors[1]).backward()
    if clip is not None:
        scaler.unscale_(sam)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(sam)
    scaler.update()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("base", ["SGD", "AdamW fused", "SOAP"])
@pytest.mark.parametrize(
    ("factors", "enabled"),
    [((1.0, 1.0), True), ((1.0, 1.0), False), ((torch.inf, 1.0), True), ((1.0, torch.inf), True)],
)
def test_grad_scaler(
    base: str, clip: float | None, factors: tuple[float, float], enabled: bool
) -> None:
    cls, kwargs = BASES[base]
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, cls, rho=0.4, **kwargs) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, enabled=enabled)
    overflows = factors != (1.0, 1.0)
    for step in range(4):
        if step == 2 and overflows:
            before = bits(model, sam)
            scaled_step(model, sam, scaler, step, factors, clip)
            assert same_bits(bits(model, sam), before)
            assert sam.skipped == 1
            assert scaler.get_scale() == 2.0**9
        scaled_step(model, sam, scaler, step, clip=clip)
        reference.zero_grad()
        loss_of(twin, step).backward()
        reference.first_step(zero_grad=True)
        loss_of(twin, step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        reference.second_step()
        # the scale is a power of two, so only the 1e-12 beside the norm differs
        assert_close(values(model), values(twin), 1e-5)
    assert scaler.get_scale() == (1.0 if not enabled else 2.0**9 if overflows else 2.0**10)
    assert sam.skipped == overflows
    assert not hasattr(sam, "grad_scale")


def test_scaler_after_a_failed_first_pass_whose_gradients_someone_cleared() -> None:
    p = one(1.0, grad=[torch.inf])
    sam, scaler = SAM([p], SGD, lr=0.1), torch.amp.GradScaler("cpu")
    sam.first_step(zero_grad=True)
    p.grad = None
    scaler.scale(p.sum()).backward()
    with pytest.warns(UserWarning, match="first pass"):
        scaler.step(sam)
    scaler.update()
    assert (p.item(), sam.skipped) == (1.0, 1)


def test_scale_of_a_step_that_raised_is_forgotten() -> None:
    p = one(1.0)
    sam = SAM([p], SGD, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    base: Any = sam.base_optimizer
    step, base.step = base.step, fail
    for _ in range(2):
        sam.zero_grad()
        scaler.scale(p.sum()).backward()
        sam.first_step(zero_grad=True)
        scaler.scale(p.sum()).backward()
        if base.step is fail:
            with pytest.raises(RuntimeError, match="out of luck"):
                scaler.step(sam)
            base.step = step
        else:
            scaler.step(sam)
        scaler.update()
    assert p.item() == 0.0


def test_float16_gradients_are_not_unscaled() -> None:
    p = one(1.0, dtype=torch.float16)
    sam, scaler = SAM([p], SGD, lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    sam.first_step(zero_grad=True)
    scaler.scale(p.sum()).backward()
    with pytest.raises(GradientError, match="Keep the parameters in float32"):
        scaler.step(sam)
    assert p.item() == 1.0
