"""Memory formats and devices of parameters do not matter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    SIRFShampoo,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    dense_units,
    mlp,
    set_grads,
    train,
    train_dense,
    values,
)


def test_memory_format_of_parameters_and_gradients_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 2)).double()
    other: Any = copy.deepcopy(model)
    other.to(memory_format=torch.channels_last)
    optimizer, reference = (SIRFShampoo(m, batch_size=2, **SETTINGS) for m in (other, model))
    for step in range(4):
        for m, o in ((other, optimizer), (model, reference)):
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step)).double()
            o.zero_grad()
            m(x).square().sum(1).mean().backward()
            o.step()
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(values(other), values(model))


def test_default_device_at_construction_does_not_matter() -> None:
    # the meta device replaces a GPU here: torch.set_default_device("cuda") is common
    model = mlp()
    twin = copy.deepcopy(model)
    with torch.device("meta"):
        optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    train(model, optimizer, 2)
    train_dense(twin, dense_units(twin), 2)
    assert_close(values(model), values(twin))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("missing", [False, True])
def test_state_follows_a_model_that_moves_to_another_device(missing: bool) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    reference = SIRFShampoo(twin, batch_size=6, **SETTINGS)
    for step in range(6):
        if step == 3:
            model.cuda()
        for m, o in ((model, optimizer), (twin, reference)):
            set_grads(list(m.parameters()), step)
            for p in m.parameters():
                assert p.grad is not None
                p.grad = p.grad.to(p.device)
            if missing:
                m[2].weight.grad = None
            o.step()
    assert all(p.is_cuda for p in model.parameters())
    assert optimizer.state[model[0].weight]["momentum_buffer"].is_cuda
    assert_close([v.cpu() for v in values(model)], values(twin), 1e-10)
