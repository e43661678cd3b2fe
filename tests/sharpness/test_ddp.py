"""SAM under DistributedDataParallel: m-SAM, where each rank perturbs by its own gradient."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from structprecond import SAM, SOAP
from tests import helpers, processes
from tests.helpers import assert_close, same_bits
from tests.sharpness.helpers import square

RANKS, STEPS, RHO = 2, 4, 0.4
BAD_STEP, BAD_RANK = 2, 1
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "SOAP": (SOAP, {"lr": 0.1, "precondition_frequency": 2}),
}

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """Return the loss of a rank's own batch."""
    return helpers.loss_of(model, RANKS * step + rank)


def build(case: str) -> tuple[nn.Module, SAM]:
    torch.manual_seed(0)
    model, (base, kwargs) = square(), CASES[case]
    return model, SAM(model, base, rho=RHO, **kwargs)


def build_parallel(case: str, wrapped: bool) -> tuple[DistributedDataParallel, SAM]:
    """Return a parallel model, and a SAM that was given it if `wrapped`, else the model inside."""
    model, sam = build(case)
    parallel = DistributedDataParallel(model)
    base, kwargs = CASES[case]
    return parallel, SAM(parallel, base, rho=RHO, **kwargs) if wrapped else sam


def train(rank: int, case: str, bad: bool, wrapped: bool) -> tuple[list[Tensor], int]:
    """Train as the docstring of SAM says; return the parameters, and the number of skips."""
    parallel, sam = build_parallel(case, wrapped)
    for step in range(STEPS):
        sam.zero_grad()
        with parallel.no_sync():
            loss_of(parallel, step, rank).backward()
        if bad and (step, rank) == (BAD_STEP, BAD_RANK):
            grad = next(parallel.parameters()).grad
            assert grad is not None
            grad[0, 0] = torch.inf
        sam.first_step(zero_grad=True)
        loss_of(parallel, step, rank).backward()
        sam.second_step()
    return [p.detach().clone() for p in parallel.parameters()], sam.skipped


def work(rank: int, folder: str) -> None:
    """Run all cases on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=30),
    )
    try:
        results = {
            kind: train(rank, *kind)
            for kind in itertools.product(CASES, (False, True), (False, True))
        }
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Return the final values of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(work, (str(folder),), nprocs=RANKS, start_method=processes.METHOD)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


def by_hand(case: str, bad: bool) -> list[Tensor]:
    """Compute m-SAM in one process: the mean of gradients at as many perturbed points as ranks."""
    model, sam = build(case)
    base, params = sam.base_optimizer, list(model.parameters())
    for step in range(STEPS):
        if bad and step == BAD_STEP:
            continue
        old = [p.detach().clone() for p in params]
        total = [torch.zeros_like(p) for p in params]
        for rank in range(RANKS):
            grads = torch.autograd.grad(loss_of(model, step, rank), params)
            scaled = [o.abs() * g for o, g in zip(old, grads, strict=True)]
            norm = torch.cat([s.flatten() for s in scaled]).norm()
            with torch.no_grad():
                for p, o, s in zip(params, old, scaled, strict=True):
                    p.copy_(o + RHO / (norm + 1e-12) * o.abs() * s)
            second = torch.autograd.grad(loss_of(model, step, rank), params)
            with torch.no_grad():
                for p, o, t, g in zip(params, old, total, second, strict=True):
                    p.copy_(o)
                    t += g / RANKS
        for p, t in zip(params, total, strict=True):
            p.grad = t
        base.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_each_other_and_with_one_process(
    case: str, bad: bool, wrapped: bool, results: list[dict[Any, Any]]
) -> None:
    """Also if the first pass fails on one rank, unnoticed by the others."""
    (first, skips), (second, others) = (result[case, bad, wrapped] for result in results)
    assert same_bits(first, second)
    assert_close(first, by_hand(case, bad), 1e-9)
    # a structured base that knows of no other ranks skips by itself
    knows = case == "SGD" or wrapped
    assert (skips, others) == ((bad, bad) if knows else (0, bad))
