"""Owned rows give the same bits as a replicated optimizer, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from structprecond import SOAP, StructuredOptimizer
from tests.distributed import layouts, pool
from tests.helpers import same_bits

STEPS = 12


def train(layout: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the parameters with owners, and without any."""
    results: list[list[torch.Tensor]] = []
    for name in (layout, "replicated"):
        model = layouts.LAYOUTS[name](layouts.mlp())
        mesh: Any = dist.group.WORLD if name == layout == "replicated" and not results else None
        optimizer: StructuredOptimizer = SOAP(model, lr=0.01, precondition_frequency=5, mesh=mesh)
        for step in range(STEPS):
            layouts.set_grads(model, step)
            optimizer.step()
        results.append(layouts.full_params(model))
    return results[0], results[1]


def compare(rank: int, layout: str) -> bool:
    owned, alone = train(layout)
    return same_bits(owned, alone)


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_two_ranks_give_the_bits_of_one(layout: str) -> None:
    assert all(pool.run(2, compare, layout))


@pytest.mark.parametrize("layout", list(layouts.LAYOUTS))
def test_four_ranks_give_the_bits_of_one(layout: str) -> None:
    assert all(pool.run(4, compare, layout))
