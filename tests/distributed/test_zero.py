"""torch's ZeroRedundancyOptimizer around optimizers of this library."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from structprecond import SOAP, Muon, StructuredOptimizer
from tests.distributed import layouts, pool, resuming

OPTIMIZERS: dict[str, type[StructuredOptimizer]] = {"SOAP": SOAP, "Muon": Muon}


def make(model: nn.Module, name: str, sharded: bool) -> Any:
    """Return an optimizer of bare parameters, whose roles Muon guesses."""
    # importing it warns
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Muon routes parameters by their roles")
        if sharded:
            return ZeroRedundancyOptimizer(model.parameters(), OPTIMIZERS[name], lr=0.01)
        return OPTIMIZERS[name](model.parameters(), lr=0.01)  # type: ignore[call-arg]


def entries(optimizer: Any) -> int:
    """Return the number of entries of the state."""
    return sum(t.numel() for entry in optimizer.state.values() for t in entry.values())


def train(rank: int, name: str) -> tuple[bool, float]:
    """Train, save, resume and go on; return whether bits are right, and the share of the state."""
    models = [layouts.mlp() for _ in range(3)]
    zero, whole = make(models[0], name, True), make(models[1], name, False)
    for m, o in zip(models, (zero, whole), strict=False):
        resuming.train(m, o, 0, 4)
    zero.consolidate_state_dict(to=0)
    saved = [zero.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    resumed = make(models[2], name, True)
    resumed.load_state_dict(saved[0])
    resuming.set_params(models[2], layouts.full_params(models[0]))
    for m, o in zip(models, (zero, whole, resumed), strict=True):
        resuming.train(m, o, 4, 8)
    params = [layouts.full_params(m) for m in models]
    same = all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*params, strict=True))
    return same, entries(zero.optim) / entries(whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_share_the_state_and_resume_to_the_same_bits(name: str) -> None:
    results = pool.run(2, train, name)
    assert all(same for same, _ in results)
    assert all(share < 0.6 for _, share in results)
