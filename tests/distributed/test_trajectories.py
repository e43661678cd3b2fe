"""Real training on several ranks, against one process on the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from structprecond import SOAP, AdamW, KLShampoo, Muon, NorMuon, Shampoo, SIRFShampoo
from tests.distributed import layouts, pool
from tests.distributed.test_training import own_part

STEPS, BATCH = 30, 64
SQUARE, RECTANGULAR = (16, 16, 16, 16, 16), (16, 32, 16, 24, 16)
OPTIMIZERS: dict[str, Any] = {
    "SOAP": partial(SOAP, lr=0.01, precondition_frequency=5),
    "SOAP staggered": partial(SOAP, lr=0.01, precondition_frequency=5, refresh="staggered"),
    "KLShampoo": partial(KLShampoo, lr=0.01, precondition_frequency=5),
    "Shampoo": partial(Shampoo, lr=0.01, precondition_frequency=5),
    "SIRFShampoo": partial(SIRFShampoo, lr=0.01),
    "Muon": partial(Muon, lr=0.01),
    "NorMuon": partial(NorMuon, lr=0.01),
    "AdamW": partial(AdamW, lr=0.01),
}
SETUPS = {"ddp": 2, "fsdp": 2, "hsdp": 4, "tensor_parallel": 4}


def train(rank: int, setup: str | None, name: str, dims: Sequence[int]) -> list[Tensor]:
    """Return the parameters after some steps; without a set-up, those of one process."""
    model: Any = layouts.mlp(dims)
    mesh: Any = None
    if setup == "ddp":
        model, mesh = DistributedDataParallel(model), torch.distributed.group.WORLD
    elif setup is not None:
        model = layouts.LAYOUTS[setup](model)
    optimizer = OPTIMIZERS[name](model, mesh=mesh)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, BATCH, dims[0], generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        x, y = own_part(x, rank, setup), own_part(y, rank, setup)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return layouts.full_params(model)


def distances(rank: int, setup: str, dims: Sequence[int]) -> dict[str, float]:
    """Return how far each optimizer is from one process, relative to the parameters."""
    found = {}
    for name in OPTIMIZERS:
        together = train(rank, setup, name, dims)
        with layouts.alone():
            one = train(rank, None, name, dims)
        pairs = zip(together, one, strict=True)
        found[name] = max(float((p - q).norm() / q.norm()) for p, q in pairs)
    return found


@pytest.mark.parametrize("setup", SETUPS)
def test_square_nets_train_as_in_one_process(setup: str) -> None:
    for found in pool.run(SETUPS[setup], distances, setup, SQUARE):
        assert {n: d for n, d in found.items() if not d < (1e-6 if n == "Shampoo" else 1e-8)} == {}


@pytest.mark.parametrize(
    "setup", [pytest.param(s, marks=() if s == "fsdp" else pytest.mark.slow) for s in SETUPS]
)
def test_rectangular_nets_train_as_in_one_process(setup: str) -> None:
    for found in pool.run(SETUPS[setup], distances, setup, RECTANGULAR):
        assert {n: d for n, d in found.items() if not d < 1e-6} == {}
