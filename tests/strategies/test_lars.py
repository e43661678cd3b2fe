"""LARS against recorded trajectories and its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import LARS, HyperparameterError, LARSStrategy, StructuredOptimizer
from tests import golden


@pytest.mark.parametrize("name", golden.names("lars_"))
def test_recorded_trajectory(name: str) -> None:
    recorded = golden.load(name)
    model = recorded.model()
    assert recorded.replay(model, LARS(model, **recorded.kwargs)) < 1e-9


def test_all_recorded_trajectories_are_here() -> None:
    assert len(golden.names("lars_")) == 3


def _one_step(p: nn.Parameter, grad: Tensor, **kwargs: Any) -> Tensor:
    """Return the direction of the first step."""
    before = p.detach().clone()
    p.grad = grad.clone()
    LARS([p], lr=1.0, **kwargs).step()
    return before - p.detach()


def test_as_published_nothing_is_scaled_without_decay_or_at_zero() -> None:
    grad = torch.randn(4, 3, dtype=torch.float64)
    weight = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(_one_step(nn.Parameter(weight.clone()), grad), grad)
    zero = nn.Parameter(torch.zeros_like(weight))
    assert torch.allclose(_one_step(zero, grad, weight_decay=0.1), grad)
    # neither scaled nor decayed
    still = _one_step(nn.Parameter(weight.clone()), torch.zeros_like(grad), weight_decay=0.1)
    assert torch.equal(still, torch.zeros_like(grad))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("zero_weight", [False, True])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_always_scale(decay: float, zero_weight: bool, zero_grad: bool) -> None:
    weight, grad = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    weight, grad = weight * (not zero_weight), grad * (not zero_grad)
    moved = _one_step(
        nn.Parameter(weight.clone()),
        grad,
        weight_decay=decay,
        always_scale=True,
        trust_coefficient=0.02,
        eps=1e-6,
    )
    norm = max(weight.norm().item(), 1e-3 * 12**0.5)
    ratio = 0.02 * norm / (grad.norm().item() + decay * norm + 1e-6)
    assert torch.allclose(moved, ratio * (grad + decay * weight), rtol=1e-10, atol=1e-15)
    assert (moved.norm() > 0) == (not zero_grad or (decay > 0 and not zero_weight))


def test_each_parameter_of_a_stack_has_its_own_ratio() -> None:
    params = [nn.Parameter(s * torch.randn(3, 3, dtype=torch.float64)) for s in (1.0, 100.0)]
    params.append(nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)))
    before = [p.detach().clone() for p in params]
    grads = [torch.randn(3, 3, dtype=torch.float64) for _ in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    LARS(params, lr=1.0, weight_decay=0.1).step()
    for p, start, grad in zip(params[:2], before, grads, strict=False):
        ratio = 1e-3 * start.norm() / (grad.norm() + 0.1 * start.norm() + 1e-8)
        assert torch.allclose(start - p, ratio * (grad + 0.1 * start), rtol=1e-10)
    assert torch.allclose(-params[2], grads[2])


def test_rows_that_start_late_are_not_dampened_at_their_first_step() -> None:
    params = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = LARS(params, lr=1.0, momentum=0.5, dampening=0.75)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    # 1 - 1 - (0.5 + 0.25), and 1 - 1
    assert torch.allclose(params[0], torch.full_like(params[0], -0.75))
    assert torch.allclose(params[1], torch.zeros_like(params[1]))


def test_hyperparameters_are_per_group_and_saved() -> None:
    first, second = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    optimizer = LARS(
        [
            {"params": [first], "momentum": 0.5, "trust_coefficient": 0.1, "weight_decay": 0.2},
            {"params": [second], "nesterov": True, "eps": 1e-3, "dampening": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
    )
    saved = optimizer.state_dict()["param_groups"]
    assert [g["momentum"] for g in saved] == [0.5, 0.9]
    assert [g["trust_coefficient"] for g in saved] == [0.1, 1e-3]
    assert [g["weight_decay"] for g in saved] == [0.2, 0.0]
    assert [g["nesterov"] for g in saved] == [False, True]
    assert [g["eps"] for g in saved] == [1e-8, 1e-3]
    assert [g["dampening"] for g in saved] == [0.0, 0.0]
    other = LARS([{"params": [first]}, {"params": [second]}], lr=0.3)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["weight_decay"] == 0.2
    assert other.param_groups[1]["nesterov"] is True


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": 1.0, "nesterov": True}, "nesterov=True needs a momentum above 0"),
        ({"lr": 1.0, "momentum": 0.9, "nesterov": True, "dampening": 0.1}, "no dampening"),
        ({"lr": 1.0, "nesterov": 1, "momentum": 0.9}, "nesterov must be True or False, got 1"),
        ({"lr": 1.0, "dampening": 1.5}, "dampening must be a number from 0 to 1"),
        ({"lr": 1.0, "momentum": -0.1}, "momentum must be a number from 0 to below 1"),
        ({"lr": 1.0, "eps": float("nan")}, "eps must be a finite number"),
    ],
)
def test_wrong_arguments(kwargs: Any, message: str) -> None:
    with pytest.raises(HyperparameterError, match=message):
        LARS([nn.Parameter(torch.ones(2))], **kwargs)


def test_a_learning_rate_has_to_be_given() -> None:
    with pytest.raises(TypeError, match="lr"):
        LARS([nn.Parameter(torch.ones(2))])  # type: ignore[call-arg]
    with pytest.raises(HyperparameterError, match=r"lr must be a finite number.*got None"):
        StructuredOptimizer([nn.Parameter(torch.ones(2))], strategy=LARSStrategy())


def test_dampening_matters_to_a_momentum_alone() -> None:
    p = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    optimizer = LARS([p], lr=1.0, momentum=0.0, dampening=0.5)
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        optimizer.step()
        assert torch.allclose(before - p, p.grad)
