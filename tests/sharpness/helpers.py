"""Shared by the tests of SAM: closures, bases, and SAM computed without moving parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer

from structprecond import (
    SAM,
    SOAP,
    SIRFShampoo,
    StructuredOptimizer,
)
from tests.helpers import SETTINGS, data, loss_of, values

Groups = list[tuple[list[str], float, bool]]
"""Names of parameters, rho, adaptive."""


def closure_of(model: nn.Module, step: int) -> Callable[[], float]:
    """Return a closure that leaves clearing the gradients to SAM."""

    def closure() -> Any:
        loss = loss_of(model, step)
        loss.backward()
        return loss.detach()

    return closure


def train(model: nn.Module, sam: SAM, steps: int, start: int = 0) -> list[float]:
    """Train by closures; return the losses."""
    return [float(sam.step(closure_of(model, step))) for step in range(start, start + steps)]


def square() -> Any:
    """Return a model whose gradients from step 1 on have eigenbases that are unique up to signs.

    With other models, SOAP depends on how rounding picks a basis of a null space.
    """
    layers = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)
    return nn.Sequential(*layers).double()


def perturbation(params: dict[str, Tensor], grads: dict[str, Tensor], groups: Groups) -> Any:
    """Compute the perturbation e by name, as one long vector, with the papers' formulas."""
    T = {n: params[n].abs() if a else torch.ones_like(params[n]) for ns, _, a in groups for n in ns}
    norm = torch.cat([(T[n] * grads[n]).flatten() for n in T]).norm()
    rho = {n: r for names, r, _ in groups for n in names}
    return {n: rho[n] / (norm + 1e-12) * T[n] ** 2 * grads[n] for n in T}


def train_by_hand(
    model: nn.Module, base: Optimizer, groups: Groups, steps: int, sign: int = 1
) -> list[float]:
    """Train so that only the base moves the model's parameters."""
    losses = []
    for step in range(steps):
        params = dict(model.named_parameters())
        x, y = data(step)

        def loss_at(at: Any, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (functional_call(model, at, x) - y).square().sum(1).mean()

        base.zero_grad()
        loss = loss_at(params)
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        e = perturbation({n: p.detach() for n, p in params.items()}, grads, groups)
        elsewhere = {n: (p.detach() + sign * e[n]).requires_grad_() for n, p in params.items()}
        second = torch.autograd.grad(loss_at(elsewhere), list(elsewhere.values()))
        for p, grad in zip(params.values(), second, strict=True):
            p.grad = grad
        base.step()
        losses.append(loss.item())
    return losses


def one(*numbers: float, grad: list[float] | None = None, **kwargs: Any) -> nn.Parameter:
    """Return a parameter, with a gradient if there is one."""
    p = nn.Parameter(torch.tensor(numbers, **kwargs))
    if grad is not None:
        p.grad = torch.tensor(grad, dtype=p.dtype)
    return p


def bits(model: nn.Module, optimizer: Optimizer) -> Any:
    """Copy all that a step may change."""
    return copy.deepcopy([values(model), optimizer.state_dict()])


BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD foreach": (SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "SGD fused": (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "SGD maximize": (SGD, {"lr": 0.01, "maximize": True}),
    "AdamW": (AdamW, {"lr": 0.1}),
    "AdamW fused": (AdamW, {"lr": 0.1, "fused": True}),
    "SIRFShampoo": (SIRFShampoo, {**SETTINGS, "batch_size": 6}),
    "SIRFShampoo maximize": (
        SIRFShampoo,
        {**SETTINGS, "lr": 0.01, "batch_size": 6, "maximize": True},
    ),
    "SOAP": (SOAP, {"lr": 0.1, "precondition_frequency": 2}),
}


def build(base: type[Optimizer], model: nn.Module, **kwargs: Any) -> Optimizer:
    """Return a base optimizer, of the model or of its parameters."""
    if issubclass(base, StructuredOptimizer):
        return base(model, **kwargs)
    return base(model.parameters(), **kwargs)


def fail() -> None:
    """Raise an error that no library raises."""
    raise RuntimeError("out of luck")
