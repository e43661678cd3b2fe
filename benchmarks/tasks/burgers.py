r"""A physics-informed network for Burgers' equation in one dimension, without data.

\[ u_t + u u_x = \frac{0.01}{\pi} u_{xx}, \quad u(0, x) = -\sin \pi x, \quad
   u(t, \pm 1) = 0 \]

for t from 0 to 1 and x from -1 to 1 (Raissi et al. 2019, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from training import Task

INTERIOR, BORDER = 1024, 128


class Points:
    """Collocation points from one seed: in the interior, at the start and on both sides."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(INTERIOR + 2 * BORDER, 2, generator=generator)
        drawn[:, 1] = 2 * drawn[:, 1] - 1
        self.interior, self.start, self.sides = drawn.split([INTERIOR, BORDER, BORDER])
        self.start[:, 0] = 0
        self.sides[:, 1] = self.sides[:, 1].sign()


def residual(model: nn.Module, points: Points) -> Tensor:
    """Return the mean squares of the equation, the start and the sides, summed."""
    t, x = (column.clone().requires_grad_() for column in points.interior.unbind(1))
    u = model(torch.stack([t, x], 1)).squeeze(1)
    u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    equation = u_t + u * u_x - 0.01 / math.pi * u_xx
    start = model(points.start).squeeze(1) + (math.pi * points.start[:, 1]).sin()
    total: Tensor = equation.square().mean() + start.square().mean()
    sides: Tensor = model(points.sides).square().mean()
    return total + sides


class Burgers(Task):
    """Burgers' equation; the loss is the residual, in evaluations at points of their own."""

    steps = 1000
    samples = INTERIOR

    def __init__(self) -> None:
        self._held_out = Points(seed=2**20)

    def model(self) -> nn.Module:
        sizes = [2, 32, 32, 32, 32, 1]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def batches(self, seed: int) -> Iterator[Points]:
        points = Points(seed)
        while True:
            yield points

    def loss(self, model: nn.Module, batch: Points) -> Tensor:
        return residual(model, batch)

    def evaluate(self, model: nn.Module) -> float:
        # the equation has derivatives, so gradients stay on
        return residual(model, self._held_out).item()
