"""SIRF-Shampoo against the published implementation."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import structprecond
from structprecond import FlattenEmbedding, SIRFShampoo
from tests import golden, processes


def _structures(value: object) -> object:
    """Restore `{2: ("dense", "diagonal")}` from JSON."""
    if not isinstance(value, dict):
        return value
    return {int(k): tuple(v) if isinstance(v, list) else v for k, v in value.items()}


@pytest.mark.parametrize("name", golden.names("sirf_"))
def test_reproduces_the_published_trajectory(name: str) -> None:
    recorded = golden.load(name)
    kwargs = recorded.kwargs
    kwargs["structures"] = _structures(kwargs["structures"])
    rules = tuple(getattr(structprecond, rule)() for rule in recorded.meta["combine_params"])
    model = recorded.model()
    optimizer = SIRFShampoo(model, combine_params=rules, **kwargs)
    assert recorded.replay(model, optimizer) < 1e-9


def test_blocks_that_hold_every_axis_equal_dense_over_50_steps() -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(7, 30), nn.Tanh(), nn.Linear(30, 12), nn.Tanh()).double()
    inputs, targets = torch.randn(16, 7).double(), torch.randn(16, 12).double()
    models = []
    for structure in ("dense", "block30diagonal"):
        model = copy.deepcopy(start)
        optimizer = SIRFShampoo(model, lr=0.05, beta2=0.05, lam=0.01, structures=structure)
        for _ in range(50):
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
        models.append(model)
    for p, q, p0 in zip(*(m.parameters() for m in (*models, start)), strict=True):
        assert (p - p0).norm() > 0.1
        assert (p - q).norm() <= 1e-10 * p.norm()


def _peak_with_a_large_embedding(structure: str) -> int:
    """Train, and return the peak memory of the process in bytes."""
    model = nn.Embedding(512, 256)
    optimizer = SIRFShampoo(model, structures=structure, combine_params=(FlattenEmbedding(),))
    before = model.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(512)).square().mean().backward()
        optimizer.step()
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before)
    # not ru_maxrss, which a process inherits from its parent
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("structure", ["triltoeplitz", "triutoeplitz", "hierarchical15_15"])
def test_a_flattened_embedding_steps_in_less_than_2_gb(structure: str) -> None:
    # a dense factor of 512 * 256 rows would take 69 GB
    assert processes.result_of(_peak_with_a_large_embedding, structure) < 2e9


def test_factors_stored_in_bfloat16_follow_those_in_float64() -> None:
    start = torch.randn(4, 3, dtype=torch.float64)
    factors = []
    for dtype in (torch.float64, torch.bfloat16):
        p = torch.nn.Parameter(start.clone())
        optimizer = SIRFShampoo([p], batch_size=4, beta2=0.3, preconditioner_dtypes=dtype)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            p.grad = torch.randn(4, 3, dtype=torch.float64, generator=generator)
            optimizer.step()
        factors.append(optimizer.state[p]["preconditioner.0.mat"].double())
    assert (factors[0] - torch.eye(4)).norm() > 0.1
    assert (factors[1] - factors[0]).norm() < 0.05 * factors[0].norm()


@pytest.mark.parametrize("structure", ["dense", "diagonal", "block2diagonal", "triltoeplitz"])
def test_factors_start_from_the_first_gradient(structure: str) -> None:
    shapes, samples, damping = [(4, 6), (4, 6), (5,), (2, 3, 2)], 8, 0.3
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = SIRFShampoo(
        params, lr=0.1, beta2=0.0, lam=damping, alpha1=0.0, structures=structure,
        batch_size=samples, init="gradient",
    )  # fmt: skip
    expected = []
    for i, p in enumerate(params):
        p.grad = torch.randn_like(p) * 10.0**-i
        mean = sum(x * x for x in p.grad.flatten().tolist()) / p.numel()
        # each of the N factors enters twice: K K^T
        expected.append(p.detach() - 0.1 * p.grad / (samples * mean + damping))
    optimizer.step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value)


def test_a_row_waits_for_a_gradient_to_start_from() -> None:
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = SIRFShampoo(params, lr=0.1, kappa=0.1, batch_size=4, lam=0.0, init="gradient")
    params[0].grad, params[1].grad = torch.randn(3, 4), torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(params[1], torch.ones(3, 4))
    assert not torch.equal(params[0], torch.ones(3, 4))
    params[1].grad = torch.randn(3, 4)
    optimizer.step()
    assert params[1].isfinite().all()
    assert not torch.equal(params[1], torch.ones(3, 4))
    with pytest.raises(structprecond.StructPrecondError, match="init"):
        SIRFShampoo(params, init="zero", batch_size=4)  # type: ignore[arg-type]
