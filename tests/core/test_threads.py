"""Optimizers that step in several threads of one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from torch import nn

from structprecond import SOAP, Muon, Shampoo, StructuredOptimizer
from tests.helpers import set_grads, values

Make = Callable[[nn.Module], StructuredOptimizer]
MAKERS: list[Make] = [
    partial(SOAP, precondition_frequency=1),
    partial(Shampoo, precondition_frequency=1, root="coupled_newton", eps=1e-3),
    partial(Muon, lr=0.1),
]


def _settings() -> list[str]:
    if not hasattr(torch._C, "_get_fp32_precision_getter"):
        return [torch.get_float32_matmul_precision()]
    places = ("cuda", "matmul"), ("mkldnn", "matmul"), ("generic", "all")
    return [torch._C._get_fp32_precision_getter(*place) for place in places]


def _train(make: Make, barrier: Barrier | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterList(torch.randn(8, 6, generator=generator) for _ in range(3))
    optimizer = make(model)
    if barrier is not None:
        barrier.wait()
    for step in range(30):
        set_grads(list(model), step)
        optimizer.step()
    return values(model)


@pytest.mark.parametrize("attempt", range(3))
def test_threads_that_step_at_once_compute_the_same_and_leave_settings_alone(attempt: int) -> None:
    before, interval = _settings(), sys.getswitchinterval()
    expected = [_train(make) for make in MAKERS]
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(MAKERS)) as executor:
            run = partial(_train, barrier=Barrier(len(MAKERS)))
            results = list(executor.map(run, MAKERS))
    finally:
        sys.setswitchinterval(interval)
    assert _settings() == before
    for result, alone in zip(results, expected, strict=True):
        assert all(map(torch.equal, result, alone))
