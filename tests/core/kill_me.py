"""A training job that saves every few steps and resumes; `test_kill.py` kills it."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprecond import SOAP, KLShampoo, Muon, SIRFShampoo, StructuredOptimizer

EVERY = 3
"""The number of steps between two checkpoints."""

HIERARCHICAL: Any = {1: "diagonal", 2: ("hierarchical2_1", "dense")}
OPTIMIZERS: dict[str, Callable[[nn.Module], StructuredOptimizer]] = {
    "SOAP staggered": lambda m: SOAP(m, lr=0.01, precondition_frequency=4, refresh="staggered"),
    "SIRFShampoo": lambda m: SIRFShampoo(m, lr=0.01, T=2, structures=HIERARCHICAL),
    "Muon": lambda m: Muon(m, lr=0.01, adamw_lr=0.003, nesterov=True),
    "KLShampoo": lambda m: KLShampoo(m, lr=0.01, precondition_frequency=3),
}


class Net(nn.Module):
    """A classifier of sequences, with parameters of several roles."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.hidden = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of `x` `(batch, length)`."""
        logits: Tensor = self.head(self.hidden(self.words(x)).mean(1))
        return logits


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a file atomically: it is always the old or the new one."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def main(path: Path, steps: int, progress: Connection) -> None:
    """Train one model with each optimizer, from the last checkpoint if there is one.

    Args:
        path: The file of the checkpoint.
        steps: The step to train up to.
        progress: Receives the number of each finished step.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {name: Net() for name in OPTIMIZERS}
    optimizers = {name: make(models[name]) for name, make in OPTIMIZERS.items()}
    parts: dict[str, Any] = {"models": models, "optimizers": optimizers}
    start = 0
    if path.exists():
        saved = torch.load(path)
        start = saved["step"]
        for kind, members in parts.items():
            for name, member in members.items():
                member.load_state_dict(saved[kind][name])
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(7, (8, 5), generator=generator)
        for name, model in models.items():
            optimizers[name].zero_grad()
            nn.functional.cross_entropy(model(x), x.sum(1) % 3).backward()
            optimizers[name].step()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            state = {
                kind: {name: member.state_dict() for name, member in members.items()}
                for kind, members in parts.items()
            }
            save({**state, "step": step + 1}, path)
        progress.send(step)
