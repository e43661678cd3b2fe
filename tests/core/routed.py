"""A network with many kinds of parameters, and an optimizer that routes each to a strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    AdamWStrategy,
    MuonStrategy,
    SOAPStrategy,
    StructuredOptimizer,
)
from structprecond.core.strategy_names import name_of


class Net(nn.Module):
    """Convolutions, hidden matrices, an embedding, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).mT
        x = self.norm(self.conv2(self.conv1(x)).relu().mean(-1))
        out: Tensor = self.head(self.hidden(x).relu())
        return out


MIXED: Any = {"conv": SOAPStrategy(), "matrix": MuonStrategy(), "default": AdamWStrategy()}


def net() -> Net:
    """Return a network with fixed initial parameters."""
    torch.manual_seed(0)
    return Net()


def mixed(model: nn.Module, **kwargs: Any) -> StructuredOptimizer:
    """Return an optimizer with three strategies."""
    settings = {"lr": 0.01, "soap_precondition_frequency": 3, "muon_lr_scale": 0.5}
    return StructuredOptimizer(model, strategy=MIXED, hyperparameters=settings, **kwargs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Train the network; return the losses."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 9, (32, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), tokens[:, 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def warns_of_roles() -> Any:
    """Return a context that takes the warning about roles of bare parameters."""
    return pytest.warns(UserWarning, match=r"was given parameters without a model or names\. The r")


def routes_of(optimizer: StructuredOptimizer) -> dict[str, tuple[str, str]]:
    """Return the strategy and the rule of every unit."""
    return {
        unit.label: (name_of(bucket.strategy), rule)
        for bucket in optimizer.buckets
        for unit, rule in zip(bucket.units, bucket.rules, strict=True)
    }
