"""Training under `accelerate`, which shards models after their optimizers were built."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from structprecond import SOAP, Muon
from tests.distributed import layouts, pool

STEPS, BATCH = 5, 64
OPTIMIZERS: list[Any] = [SOAP, Muon]


def train(model: nn.Module, optimizer: Any, schedule: Any, backward: Any, part: slice) -> None:
    """Train on a part of each batch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x, y = torch.randn(2, BATCH, layouts.DIMS[0], generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        backward((model(x[part]) - y[part]).square().mean())
        optimizer.step()
        schedule.step()


def made(optimizer: Any) -> tuple[Any, Any, Any]:
    model = layouts.mlp()
    own = optimizer(model, lr=0.01)
    return model, own, LambdaLR(own, lambda step: 1 / (1 + step))


def accelerated(rank: int, optimizer: Any, sharded: bool, first: bool) -> tuple[float, str]:
    """Return how far training under `accelerate` is from training alone, and the kind of team.

    Args:
        rank: The rank.
        optimizer: The optimizer's class.
        sharded: Whether to use FSDP2 instead of DDP.
        first: Whether the model is prepared before the optimizer is built.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    world = dist.get_world_size()
    launched = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    launched["OMP_NUM_THREADS"] = 1
    before = dict(os.environ)
    os.environ |= {name: str(value) for name, value in launched.items()}
    try:
        accelerator: Any = Accelerator(cpu=True)
        if sharded:  # of which it knows only accelerators
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=200
            )
            accelerator.state.distributed_type = DistributedType.FSDP
        if first:
            model = accelerator.prepare(layouts.mlp())
            own = optimizer(model, lr=0.01)
            schedule = LambdaLR(own, lambda step: 1 / (1 + step))
            own, schedule = accelerator.prepare(own, schedule)
        else:
            model, own, schedule = accelerator.prepare(*made(optimizer))
        own_part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        # the schedule is stepped once per process otherwise
        train(model, own, schedule.scheduler, accelerator.backward, own_part)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ |= before
    alone = made(optimizer)
    train(*alone, backward=Tensor.backward, part=slice(None))
    distances = [
        float((p - q).norm() / q.norm())
        for p, q in zip(layouts.full_params(model), layouts.full_params(alone[0]), strict=True)
    ]
    return max(distances), type(own.optimizer.team).__name__


@pytest.mark.parametrize(
    ("sharded", "first", "team"),
    [(False, False, "Alone"), (False, True, "Replicas"), (True, False, "Owners")],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accelerate_trains_as_one_process(
    optimizer: Any, sharded: bool, first: bool, team: str
) -> None:
    pytest.importorskip("accelerate")
    for distance, kind in pool.run(2, accelerated, optimizer, sharded, first):
        assert distance < 1e-9
        assert kind == team
