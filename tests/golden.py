"""Replays trajectories recorded from published implementations (tests/data)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

DATA = Path(__file__).parent / "data"
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "linear_nobias": lambda n, m: nn.Linear(n, m, bias=False),
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "embedding": nn.Embedding,
    "layernorm": nn.LayerNorm,
}


@dataclass(frozen=True)
class Golden:
    """A recorded trajectory: arrays by key, and the settings of the run."""

    arrays: dict[str, Any]
    meta: dict[str, Any]

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.meta["kwargs"])

    def model(self) -> nn.Sequential:
        """Build the model with the recorded initial parameters."""
        dtype = getattr(torch, self.meta.get("dtype", "float64"))
        model = nn.Sequential(*(LAYERS[kind](*sizes) for kind, *sizes in self.meta["model"]))
        model = model.to(dtype)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.from_numpy(self.arrays[f"init|{name}"]))
        return model

    def replay(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """Feed the recorded gradients; return the worst relative error of any parameter."""
        worst = 0.0
        for step in range(self.meta["steps"]):
            for name, p in model.named_parameters():
                p.grad = torch.from_numpy(self.arrays[f"grad|{step}|{name}"]).to(p.dtype)
            optimizer.step()
            for name, p in model.named_parameters():
                expected = torch.from_numpy(self.arrays[f"param|{step}|{name}"]).double()
                error = (p.detach().double() - expected).norm() / expected.norm()
                worst = max(worst, error.item())
        return worst


def load(name: str) -> Golden:
    """Read a trajectory by name."""
    arrays = dict(np.load(DATA / f"{name}.npz"))
    return Golden(arrays, json.loads(str(arrays.pop("meta"))))


def names(prefix: str) -> list[str]:
    """Return the names of all trajectories with a prefix."""
    return sorted(path.stem for path in DATA.glob(f"{prefix}*.npz"))
